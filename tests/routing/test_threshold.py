"""D2DMoE's rules of choice: by a share of the largest score, by a share of all, by number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.record import DEAD
from dynmoe_jax.routing.routers import Threshold
from tests.routing.given import D, E, T, given, params_of

SCORES = np.array([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 0.0, 0.0]], np.float32)


def chosen(router, scores=SCORES):
    """Sets of experts of tokens whose scores are those, behind either sign."""
    signs = np.where(np.arange(scores.shape[-1]) % 2, -1, 1)
    routing = router.on_logits(jnp.asarray(scores * signs), jnp.ones(len(scores), bool))
    used_TK = np.asarray(routing.used_TK)
    np.testing.assert_array_equal(routing.weight_TK, used_TK.astype(np.float32))
    pairs = zip(np.asarray(routing.expert_TK), used_TK, strict=True)
    return [set(experts[used].tolist()) for experts, used in pairs]


def test_experts_are_chosen_as_by_hand():
    every = {0, 1, 2, 3}
    assert chosen(Threshold(0.5)) == [{0, 2, 3}, every, {1}]
    assert chosen(Threshold(0.6)) == [{0, 2}, every, {1}]
    assert chosen(Threshold(1.0)) == [{0}, every, {1}]
    # 4 of 10 are less than half, 4 + 3 are not; of even scores two are half.
    assert chosen(Threshold(0.5, rule="cumulative")) == [{0, 2}, {0, 1}, {1}]
    assert chosen(Threshold(0.4, rule="cumulative"))[0] == {0}
    assert chosen(Threshold(0.0, rule="cumulative")) == [{0}, {0}, {1}]
    assert chosen(Threshold(rule="fixed", k=3))[0] == {0, 2, 3}


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 1.0])
def test_the_released_code_counts_from_the_other_end(tau):
    assert chosen(Threshold(tau, sense="released")) == chosen(Threshold(1.0 - tau))


@pytest.mark.parametrize(
    "router",
    [Threshold(0.0), Threshold(1.0, sense="released"), Threshold(1.0, rule="cumulative")],
    ids=str,
)
def test_at_one_end_all_are_kept_those_that_score_nothing_too(router):
    assert chosen(router) == [{0, 1, 2, 3}] * 3
    assert router.bounds(E).fewest == router.bounds(E).expected == E


@pytest.mark.parametrize("rule", ["largest", "cumulative"])
def test_the_number_of_experts_is_monotone_and_differs_between_tokens(rule):
    scores = np.random.default_rng(0).standard_normal((T, E)).astype(np.float32)
    taus = np.linspace(0.0, 1.0, 11)
    counts = np.array([[len(s) for s in chosen(Threshold(t, rule=rule), scores)] for t in taus])
    steps = np.diff(counts, axis=0)
    assert (steps <= 0).all() if rule == "largest" else (steps >= 0).all()
    assert counts[3:8].var(axis=1).min() > 0
    expected = [Threshold(float(t), rule=rule).bounds(E).expected for t in taus]
    assert np.sign(np.diff(expected)).tolist() == [-1.0 if rule == "largest" else 1.0] * 10


def test_a_dead_expert_is_never_taken_and_padding_takes_none():
    logits = jnp.asarray(SCORES).at[:, 0].set(DEAD).at[1].set(jnp.nan)
    routing = Threshold(0.0).on_logits(logits, jnp.array([True, False, True]))
    np.testing.assert_array_equal(routing.experts_per_token_T, [3, 0, 3])
    assert not np.any(routing.expert_TK == 0)
    np.testing.assert_allclose(routing.probs_TE[0], [0, 1 / 6, 1 / 2, 1 / 3], rtol=1e-6)


def test_scores_are_those_of_two_layers_and_gradients_reach_both():
    router = Threshold(0.3, hidden_width=5)
    params = params_of(router)
    x_TD = jax.random.normal(jax.random.key(1), (T, D))
    hidden = np.maximum(x_TD @ params["router_in_DU"] + params["router_in_bias_U"], 0)
    expected = hidden @ np.asarray(params["router_out_UE"]) + params["router_out_bias_E"]
    np.testing.assert_allclose(router.logits(params, x_TD, E), expected, rtol=1e-4, atol=1e-5)

    def loss(params):
        seen = given(router, jnp.zeros((T, E)), params=params, x_TD=x_TD)
        return jnp.sum(router(params, seen).weight_TK * jnp.arange(E))

    gradients = jax.grad(loss)(params)
    assert all(float(jnp.abs(gradient).max()) > 0 for gradient in gradients.values())
