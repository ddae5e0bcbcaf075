"""Loss-free balancing: what the bias may change, how it moves, and groups of experts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.routers import SigmoidBias
from tests.routing.given import E, T, given, replace

ROUTER = SigmoidBias(k=3)


def draw(router=ROUTER, experts=E):
    return given(router, jax.random.normal(jax.random.key(0), (T, experts)))


def with_bias(seen, bias_E, router=ROUTER):
    return router({}, replace(seen, state={"bias_E": bias_E}))


def stacked(tree):
    return jax.tree.map(lambda x: x[None], tree)


def next_bias(router, seen, *parts):
    """The bias after an update by what is measured of some parts of a batch, together."""
    measured = [router.measure({}, part, router({}, part)) for part in parts or (seen,)]
    together = jax.tree.map(lambda *x: sum(x), *measured)
    after, revised = router.next_state({}, stacked(seen.state), stacked(together))
    assert revised is None
    return after["bias_E"][0]


def test_a_bias_that_all_experts_share_changes_nothing():
    seen = draw()
    plain, shifted = with_bias(seen, jnp.zeros(E)), with_bias(seen, jnp.full(E, 0.25))
    np.testing.assert_array_equal(plain.expert_TK, shifted.expert_TK)
    np.testing.assert_array_equal(plain.weight_TK, shifted.weight_TK)


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_the_bias_chooses_and_does_not_weigh(score):
    seen = draw()
    routing = with_bias(seen, jnp.zeros(E).at[5].set(3.0), SigmoidBias(k=3, score=score))
    assert np.all(np.any(np.asarray(routing.expert_TK) == 5, axis=-1))
    logits_TE = np.asarray(seen.logits_TE, np.float64)
    score_TE = 1 / (1 + np.exp(-logits_TE))
    if score == "sqrt_softplus":
        score_TE = np.sqrt(np.log1p(np.exp(logits_TE)))
    chosen_TK = np.take_along_axis(score_TE, np.asarray(routing.expert_TK), axis=-1)
    wanted_TK = chosen_TK / chosen_TK.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(routing.weight_TK, wanted_TK, rtol=1e-5)


def test_no_gradient_reaches_the_bias_and_the_router_gets_that_of_plain_top_k():
    seen, bias_E = draw(), jnp.linspace(-0.3, 0.3, E)
    along_TK = jax.random.normal(jax.random.key(1), (T, 3))
    chosen_TK = with_bias(seen, bias_E).expert_TK

    def loss(bias_E, logits_TE):
        routing = with_bias(replace(seen, logits_TE=logits_TE), bias_E)
        return jnp.sum(routing.weight_TK * along_TK)

    def plain(logits_TE):
        score_TK = jnp.take_along_axis(jax.nn.sigmoid(logits_TE), chosen_TK, axis=-1)
        return jnp.sum(score_TK / jnp.sum(score_TK, axis=-1, keepdims=True) * along_TK)

    of_bias, of_logits = jax.grad(loss, argnums=(0, 1))(bias_E, seen.logits_TE)
    np.testing.assert_array_equal(of_bias, 0)
    np.testing.assert_allclose(of_logits, jax.grad(plain)(seen.logits_TE), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_scores_that_float32_has_no_numbers_for_have_shares_and_slopes(score):
    router = SigmoidBias(k=2, score=score)

    def total(logits_TE):
        routing = router({}, given(router, logits_TE))
        return jnp.sum(routing.weight_TK**2) + jnp.sum(routing.probs_TE**2)

    value, slope_TE = jax.value_and_grad(total)(jnp.array([[-120.0, -110, -500, -130]]))
    np.testing.assert_allclose(value, 2 * 0.5**2 + 4 * 0.25**2, rtol=1e-5)
    assert np.all(np.isfinite(slope_TE))


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    router = SigmoidBias(k=1, rate=0.01)
    state_N = {"bias_E": jnp.zeros((2, 4))}
    # Mean 5 in the first layer: one above, two below, one at it.
    seen_N = {"load_E": jnp.array([[9, 2, 4, 5], [5, 5, 5, 5]])}
    after, revised = router.next_state({}, state_N, seen_N)
    np.testing.assert_allclose(after["bias_E"], [[-0.01, 0.01, 0.01, 0], [0] * 4], rtol=1e-6)
    assert revised is None
    router = SigmoidBias(k=1, rate=0.01, update_rule="proportional")
    after, _ = router.next_state({}, state_N, seen_N)
    wanted = [[-0.01 * 4 / 5, 0.01 * 3 / 5, 0.01 * 1 / 5, 0], [0] * 4]
    np.testing.assert_allclose(after["bias_E"], wanted, rtol=1e-6)


TOY = jnp.array([[0.9, 0.5], [0.8, 0.7], [0.7, 0.2], [0.6, 0.45]])
"""Scores of four tokens that all prefer the first of two experts."""


@pytest.mark.parametrize("update", ["quantile", "mean_of_quantiles"])
def test_quantiles_of_a_toy(update):
    router = SigmoidBias(k=1, update_rule=update)
    logits_TE = jnp.log(TOY / (1 - TOY))
    seen = given(router, logits_TE)
    assert router({}, seen).load_E.tolist() == [4, 0]
    bias_E = next_bias(router, seen)
    # -b = (0.15, 0) before its mean is taken away; a bin of the histogram is 0.002 wide.
    wanted = np.array([-0.15, 0.0]) + 0.075
    np.testing.assert_allclose(bias_E, wanted, atol=1e-6 if "mean" in update else 2.1e-3)
    above_T = TOY[:, 0] + bias_E[0] > TOY[:, 1] + bias_E[1] + 2e-3
    assert above_T.tolist() == [True, False, True, False]


def test_a_quantile_is_that_of_the_whole_batch_and_padding_counts_nowhere():
    valid_T = jnp.arange(T) % 5 != 2
    seen = given(SigmoidBias(), 2 * draw().logits_TE, valid_T)
    parts = [
        replace(seen, logits_TE=jnp.where(valid_T[half, None], seen.logits_TE[half], jnp.nan),
                valid_T=valid_T[half])
        for half in (slice(0, T // 4), slice(T // 4, T))
    ]  # fmt: skip
    pooled, mean = (SigmoidBias(update_rule=each) for each in ("quantile", "mean_of_quantiles"))
    whole = next_bias(pooled, seen)
    np.testing.assert_array_equal(next_bias(pooled, seen, *parts), whole)
    exact = next_bias(mean, seen)
    np.testing.assert_allclose(whole, exact, atol=5e-3)
    assert np.max(np.abs(next_bias(mean, seen, *parts) - exact)) > 0.02
    nothing = replace(seen, valid_T=jnp.zeros(T, bool), state={"bias_E": jnp.arange(8.0)})
    for router in (pooled, mean):
        np.testing.assert_array_equal(next_bias(router, nothing), nothing.state["bias_E"])


def worst_violations(router, steps, tokens=4096, experts=64):
    """max_e load / mean load - 1 before each update, of noise and an offset of each expert."""
    offset_E = jax.random.normal(jax.random.key(7), (experts,))

    def step(state, seed):
        logits_TE = offset_E + jax.random.normal(jax.random.key(seed), (tokens, experts))
        seen = given(router, logits_TE)
        seen = replace(seen, state=state)
        routing = router({}, seen)
        measured = router.measure({}, seen, routing)
        after, _ = router.next_state({}, stacked(state), stacked(measured))
        load_E = routing.load_E
        return jax.tree.map(lambda x: x[0], after), jnp.max(load_E) / jnp.mean(load_E) - 1

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps))[1])
    return run(router.initial_state(experts))


def test_one_update_by_quantiles_balances_where_signs_take_hundreds():
    by_quantile = worst_violations(SigmoidBias(k=4, update_rule="quantile"), 3)
    assert by_quantile[0] > 3
    assert by_quantile[1] < 0.5
    assert by_quantile[2] < 0.5
    assert worst_violations(SigmoidBias(k=4, rate=1e-3), 51)[-1] > 3


@pytest.mark.parametrize(("k", "groups", "chosen"), [(4, 6, 2), (6, 4, 3)])
def test_groups_are_those_of_all_subsets(k, groups, chosen):
    experts = 12
    router = SigmoidBias(k=k, groups=groups, groups_chosen=chosen)
    seen, bias_E = draw(router, experts), 0.3 * jax.random.normal(jax.random.key(3), (experts,))
    expert_TK = np.asarray(with_bias(seen, bias_E, router).expert_TK)
    inside = experts // groups
    biased_TE = np.asarray(jax.nn.sigmoid(seen.logits_TE) + bias_E, np.float64)
    best = max(1, k // chosen)
    limited = False
    for biased, found in zip(biased_TE, expert_TK, strict=True):
        assert len({e // inside for e in found}) <= chosen
        score = [sorted(biased[g * inside : (g + 1) * inside])[-best:] for g in range(groups)]
        subsets = itertools.combinations(range(groups), chosen)
        kept = max(subsets, key=lambda subset: sum(sum(score[g]) for g in subset))
        allowed = [e for e in range(experts) if e // inside in kept]
        wanted = sorted(allowed, key=lambda e: -biased[e])[:k]
        assert found.tolist() == wanted
        limited |= wanted != sorted(range(experts), key=lambda e: -biased[e])[:k]
    assert limited


def test_settings_that_do_not_go_together_are_refused():
    refused = {
        "groups=3 must divide": SigmoidBias(groups=3),
        "groups_chosen=3 must be at most groups=2": SigmoidBias(groups=2, groups_chosen=3),
        "k=3 must be at most 2": SigmoidBias(k=3, groups=4, groups_chosen=1),
        "update_rule=quantile must be sign": SigmoidBias(
            groups=2, groups_chosen=1, update_rule="quantile"
        ),
    }
    for sentence, router in refused.items():
        assert router.obstacle(8).startswith(sentence)
    assert SigmoidBias(k=2, groups=4, groups_chosen=2).obstacle(8) is None


# ── The sequence-wise loss ───────────────────────────────────────────────────────────────────────


def sequence_loss(seen, length, router=ROUTER, bias_E=None):
    loss = LOSSES["sequence_balance"]()
    seen = replace(seen, length=length)
    if bias_E is not None:
        seen = replace(seen, state={"bias_E": bias_E})
    return loss.value(loss.sums(router({}, seen), seen, {}), jnp.sum(seen.valid_T))


def test_the_sequence_loss_is_that_of_a_loop_without_bias_and_groups():
    router = SigmoidBias(k=2, groups=4, groups_chosen=1)
    seen = draw(router)
    wanted = 0.0
    score_TE = 1 / (1 + np.exp(-np.asarray(seen.logits_TE, np.float64)))
    for scores in score_TE.reshape(-1, 8, E):
        f, P = np.zeros(E), np.zeros(E)
        for s in scores:
            f[np.argsort(-s)[:2]] += E / (2 * 8)
            P += s / s.sum() / 8
        wanted += f @ P / (T // 8)
    found = sequence_loss(seen, 8, router, 0.5 * jnp.arange(E))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_sequence_loss_tells_a_batch_from_its_sequences():
    # The first half of the tokens prefers four experts, the other half the other four.
    half_TE = (jnp.arange(T)[:, None] < T // 2) == (jnp.arange(E) < E // 2)
    turn_TE = (jnp.arange(E) - jnp.arange(T)[:, None]) % (E // 2) < 2
    router = SigmoidBias(k=2)
    logits_TE = jnp.where(half_TE, jnp.where(turn_TE, -10.0, -11.0), -40.0)
    seen = given(router, logits_TE)
    np.testing.assert_allclose(sequence_loss(seen, T, router), 1, rtol=1e-4)
    np.testing.assert_allclose(sequence_loss(seen, T // 2, router), 2, rtol=1e-4)
