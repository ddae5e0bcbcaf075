"""Sampled top-1, beside draws from the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.routers.gumbel import Gumbel
from tests.routing.given import E, given, params_of, replace

ROUTER = Gumbel(temperature=2.0, last_temperature=0.02, falls_for=10)


def routed(step=0, tokens=4000, training=True):
    """Routing of tokens with one row of logits, and that row."""
    logits_E = jax.random.normal(jax.random.key(3), (E,))
    seen = given(ROUTER, jnp.tile(logits_E, (tokens, 1)), training=training)
    return ROUTER(params_of(ROUTER), replace(seen, step=jnp.int32(step))), logits_E


def test_the_largest_weight_is_a_draw_from_the_softmax():
    routing, logits_E = routed()
    count_E = np.bincount(np.asarray(routing.expert_TK[:, 0]), minlength=E)
    expected_E = 4000 * np.asarray(jax.nn.softmax(logits_E))
    # Chi-square with seven degrees of freedom: one in ten thousand is above 29.9.
    assert ((count_E - expected_E) ** 2 / expected_E).sum() < 29.9


def test_weights_sum_to_one_and_sharpen_as_the_temperature_falls():
    largest = []
    for step in (0, 5, 10, 99):
        weight_TK = np.asarray(routed(step)[0].weight_TK)
        np.testing.assert_allclose(weight_TK.sum(1), 1, rtol=1e-5)
        largest.append(weight_TK[:, 0].mean())
    assert largest[0] < largest[1] < largest[2] == largest[3]
    assert largest[2] > 0.95
    taus = [float(ROUTER.tau(jnp.int32(step))) for step in (0, 5, 10, 99)]
    assert taus == pytest.approx([2.0, 0.2, 0.02, 0.02])  # by one factor a step


def test_at_inference_the_most_probable_expert_has_all_the_weight():
    routing, logits_E = routed(tokens=5, training=False)
    np.testing.assert_array_equal(routing.expert_TK, np.full((5, 1), int(jnp.argmax(logits_E))))
    np.testing.assert_array_equal(routing.weight_TK, np.ones((5, 1)))


def test_the_router_learns_from_what_experts_are_worth():
    """The weight of an expert that lowers the loss rises, without straight-through."""
    worth_E = jnp.arange(E, dtype=jnp.float32)

    def value(logits_E):
        seen = given(ROUTER, jnp.tile(logits_E, (500, 1)), training=True)
        routing = ROUTER(params_of(ROUTER), replace(seen, step=jnp.int32(0)))
        return jnp.mean(jnp.sum(routing.weight_TK * worth_E[routing.expert_TK], axis=1))

    gradient_E = jax.grad(value)(jnp.zeros(E))
    assert gradient_E[-1] > 0 > gradient_E[0]
