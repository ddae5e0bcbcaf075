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
