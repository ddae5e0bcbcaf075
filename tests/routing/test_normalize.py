"""Normalized logits: invariant to scale and shift, finite for even logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.normalize import normalized_logits

LOGITS_TE = jax.random.normal(jax.random.key(0), (64, 16))


@pytest.mark.parametrize(("factor", "shift"), [(0.01, 0.0), (1.0, -7.0), (50.0, 3.0)])
def test_scale_and_shift_of_the_logits_change_nothing(factor, shift):
    of_these = jax.nn.softmax(normalized_logits(LOGITS_TE, 2.0), axis=-1)
    of_others = jax.nn.softmax(normalized_logits(factor * LOGITS_TE + shift, 2.0), axis=-1)
    # Epsilon counts by 1e-4 of a deviation of 0.01.
    np.testing.assert_allclose(of_others, of_these, atol=2e-4)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_deviation_is_the_scale_and_the_mean_is_zero(scale):
    logits_TE = normalized_logits(LOGITS_TE, scale)
    np.testing.assert_allclose(np.std(logits_TE, axis=-1), scale, rtol=1e-4)
    np.testing.assert_allclose(np.mean(logits_TE, axis=-1), 0, atol=1e-5)


def test_values_worked_out_by_hand():
    # Mean 2, deviation sqrt(2/3): the outer ones lie sqrt(3/2) away.
    np.testing.assert_allclose(
        normalized_logits(jnp.array([[1.0, 2.0, 3.0]]), 2.0),
        [[-2 * 1.5**0.5, 0, 2 * 1.5**0.5]],
        rtol=1e-5,
        atol=1e-6,
    )


def test_even_logits_have_a_finite_slope():
    zeros_TE = jnp.zeros((2, 4))
    slope_TE = jax.grad(lambda z: jnp.sum(normalized_logits(z, 1.0) ** 2))(zeros_TE)
    np.testing.assert_array_equal(normalized_logits(zeros_TE, 1.0), zeros_TE)
    assert np.all(np.isfinite(slope_TE))
