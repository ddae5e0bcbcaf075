"""Top-k routing, k = 1 and 2, and padding of every router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.routing import TopK, TopP

T, E = 16, 8
ALL = jnp.ones(T, bool)
LOGITS_TE = jax.random.normal(jax.random.key(0), (T, E))


@pytest.mark.parametrize("k", [1, 2, E])
def test_takes_the_k_most_probable(k):
    routing = jax.jit(TopK(k).on_logits)(LOGITS_TE, ALL)
    prob_TE = np.asarray(routing.probs_TE)
    order_TE = np.argsort(-prob_TE, axis=-1)
    assert TopK(k).bounds(E).slots == k
    np.testing.assert_array_equal(routing.expert_TK, order_TE[:, :k])
    np.testing.assert_array_equal(
        routing.weight_TK, np.take_along_axis(prob_TE, order_TE[:, :k], axis=-1)
    )


def test_renormalised_weights_are_the_softmax_over_the_chosen():
    routing = jax.jit(TopK(2, renormalize=True).on_logits)(LOGITS_TE, ALL)
    chosen_TK = jnp.take_along_axis(LOGITS_TE, routing.expert_TK, axis=-1)
    np.testing.assert_allclose(routing.weight_TK, jax.nn.softmax(chosen_TK), rtol=1e-6)


def test_ties_go_to_the_lower_id():
    routing = jax.jit(TopK(2).on_logits)(jnp.zeros((T, E)), ALL)
    np.testing.assert_array_equal(routing.expert_TK, np.tile([0, 1], (T, 1)))


def test_one_expert_with_its_gate_forced_to_one_carries_no_gradient():
    def weights(logits_TE):
        return jnp.sum(TopK(1, renormalize=True).on_logits(logits_TE, ALL).weight_TK)

    total, gradient = jax.jit(jax.value_and_grad(weights))(LOGITS_TE[:, :1])
    assert total == T
    np.testing.assert_array_equal(gradient, 0.0)


def test_top_one_carries_gradient_through_its_raw_gate():
    # Without renormalisation d p_i / d logit_i = p_i (1 - p_i): Switch trains its router so.
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(TopK(1).on_logits(x, ALL).weight_TK)))(LOGITS_TE)
    routing = jax.jit(TopK(1).on_logits)(LOGITS_TE, ALL)
    p_T = routing.weight_TK[:, 0]
    own_T = jnp.take_along_axis(gradient, routing.expert_TK, axis=-1)[:, 0]
    np.testing.assert_allclose(own_T, p_T * (1 - p_T), rtol=1e-5)


ROUTERS = [TopK(3, straight_through=True), TopP(0.5, straight_through=True)]


@pytest.mark.parametrize("router", ROUTERS)
def test_straight_through_weights_are_one_with_the_gradient_of_probabilities(router):
    """d / d z_j of sum_{e in S} c_e P_e is P_j (c_j [j in S] - sum_{e in S} c_e P_e)."""
    valid_T = jnp.arange(T) != 5
    c_E = np.random.default_rng(0).normal(size=E).astype(np.float32)

    def mixed(logits_TE):
        routing = router.on_logits(logits_TE, valid_T)
        c_TK = jnp.where(routing.used_TK, jnp.asarray(c_E)[routing.expert_TK % E], 0.0)
        return jnp.sum(c_TK * routing.weight_TK), routing

    (total, routing), gradient = jax.jit(jax.value_and_grad(mixed, has_aux=True))(LOGITS_TE)
    np.testing.assert_array_equal(routing.weight_TK, np.where(routing.used_TK, 1.0, 0.0))
    chosen_TE, prob_TE = np.asarray(routing.chosen_TE), np.asarray(routing.probs_TE)
    assert total == pytest.approx(np.sum(chosen_TE * c_E), rel=1e-5)
    kept_TE = chosen_TE * c_E
    wanted_TE = prob_TE * (kept_TE - np.sum(kept_TE * prob_TE, axis=-1, keepdims=True))
    np.testing.assert_allclose(gradient, wanted_TE, rtol=1e-4, atol=1e-6)
    assert np.all(np.any(np.abs(gradient) > 1e-3, axis=-1) == valid_T)


def test_weights_that_are_one_are_not_renormalized():
    for router, setting in {"top_k": {"renormalize": True}, "top_p": {"renormalize": True}}.items():
        moe = config.MoE(router=router, **{router: {"straight_through": True, **setting}})
        with pytest.raises(config.ConfigError, match=rf"{router}.renormalize=True has no effect"):
            config.Config(model=config.Model(moe=moe))


def test_a_net_of_two_layers_begins_as_a_tanh_and_mixes_scores():
    router = TopK(2, net="tanh")
    declared = router.parameters(4, E)
    x_TD = jax.random.normal(jax.random.key(3), (T, 4))
    router_DE = jax.random.normal(jax.random.key(4), declared["router_DE"].shape)
    mix_SS = declared["mix_SS"].init(None, declared["mix_SS"].shape)
    inner_TS = np.tanh(np.asarray(x_TD) @ np.asarray(router_DE))
    params = {"router_DE": router_DE, "mix_SS": mix_SS}
    np.testing.assert_allclose(router.logits(params, x_TD, E), inner_TS, rtol=1e-5, atol=1e-6)
    params["mix_SS"] = jax.random.normal(jax.random.key(5), (E, E))
    wanted_TE = inner_TS @ np.asarray(params["mix_SS"])
    np.testing.assert_allclose(router.logits(params, x_TD, E), wanted_TE, rtol=1e-4, atol=1e-5)
    assert TopK(2).logits is None
    assert list(TopK(2).parameters(4, E)) == ["router_DE"]


@pytest.mark.parametrize("router", [TopP(0.5), TopK(2), TopK(2, renormalize=True)])
def test_padding_gets_nothing(router):
    valid_T = jnp.arange(T) % 2 == 0
    route = jax.jit(router.on_logits)
    routing = route(jnp.where(valid_T[:, None], LOGITS_TE, jnp.nan), valid_T)
    assert np.all(routing.expert_TK[1::2] == E)
    assert np.all(routing.weight_TK[1::2] == 0)
    np.testing.assert_array_equal(routing.weight_TK[::2], route(LOGITS_TE, ALL).weight_TK[::2])


def test_the_settings_make_the_router_that_they_name():
    assert config.MoE(router="top_p", top_p={"threshold": 0.3}).route == TopP(0.3)
    moe = config.MoE(router="top_k", top_k={"k": 3, "renormalize": True})
    assert moe.route == TopK(3, renormalize=True)
