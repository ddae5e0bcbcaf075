"""Chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums

B, L, D, V = 3, 10, 8, 17


def draw():
    keys = jax.random.split(jax.random.key(0), 3)
    x_BLD = jax.random.normal(keys[0], (B, L, D))
    output_DV = jax.random.normal(keys[1], (D, V))
    targets_BL = jax.random.randint(keys[2], (B, L), 0, V)
    valid_BL = (jnp.arange(L) < jnp.array([10, 4, 0])[:, None]) & (jnp.arange(L) != 2)
    return x_BLD, output_DV, targets_BL, valid_BL


def plain(x_BLD, output_DV, targets_BL, valid_BL, z_weight):
    logits_BLV = x_BLD @ output_DV
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    nll_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), targets_BL[..., None], axis=-1)[
        ..., 0
    ]
    return jnp.sum(jnp.where(valid_BL, nll_BL + z_weight * log_z_BL**2, 0.0))


# 1 token at a time; 10 = 4 + 4 + 2 padded positions; everything at once.
@pytest.mark.parametrize("chunk_tokens", [1, 12, 1000])
def test_chunks_give_the_plain_loss_and_gradients(chunk_tokens):
    x_BLD, output_DV, targets_BL, valid_BL = draw()

    def chunked(x_BLD, output_DV):
        total, _ = cross_entropy_sums(
            x_BLD, output_DV, targets_BL, valid_BL, z_weight=0.1, chunk_tokens=chunk_tokens
        )
        return 3 * total  # a cotangent other than one

    def wanted(x_BLD, output_DV):
        return 3 * plain(x_BLD, output_DV, targets_BL, valid_BL, 0.1)

    actual = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(x_BLD, output_DV)
    expected = jax.jit(jax.value_and_grad(wanted, argnums=(0, 1)))(x_BLD, output_DV)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


def test_without_gradients_the_value_is_the_same():
    arguments = draw()
    total, nll_BL = cross_entropy_sums(*arguments, chunk_tokens=6)
    np.testing.assert_allclose(total, plain(*arguments, 0.0), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(nll_BL), total, rtol=1e-6)
    assert np.all(np.asarray(nll_BL)[~np.asarray(arguments[3])] == 0)


def test_positions_that_do_not_count_may_hold_nan():
    x_BLD, output_DV, targets_BL, valid_BL = draw()
    poisoned_BLD = jnp.where(valid_BL[..., None], x_BLD, jnp.nan)

    def loss(x_BLD, output_DV):
        return cross_entropy_sums(x_BLD, output_DV, targets_BL, valid_BL)[0]

    clean = jax.value_and_grad(loss, argnums=(0, 1))(x_BLD, output_DV)
    poisoned = jax.value_and_grad(loss, argnums=(0, 1))(poisoned_BLD, output_DV)
    for p, c in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(p, c, rtol=1e-6)


def test_logits_of_the_whole_batch_never_exist():
    x_BLD = jnp.zeros((4, 64, D))
    targets_BL = jnp.zeros((4, 64), jnp.int32)

    def loss(x_BLD, output_DV):
        valid_BL = jnp.ones((4, 64), bool)
        return cross_entropy_sums(x_BLD, output_DV, targets_BL, valid_BL, chunk_tokens=32)[0]

    text = jax.jit(jax.grad(loss)).lower(x_BLD, jnp.zeros((D, 1999))).as_text()
    assert "x1999x" in text.replace(">", "x")
    assert "4x64x1999" not in text
    assert "256x1999" not in text


def test_weights_weigh_positions_and_have_a_gradient_themselves():
    x_BLD, output_DV, targets_BL, valid_BL = draw()
    weight_BL = jnp.where(valid_BL, jax.random.uniform(jax.random.key(5), (B, L)) + 0.1, 0.0)

    def weighed(x_BLD, output_DV, weight_BL):
        return cross_entropy_sums(
            x_BLD, output_DV, targets_BL, weight_BL, z_weight=0.1, chunk_tokens=12
        )[0]

    def wanted(x_BLD, output_DV, weight_BL):
        ones = jnp.ones((1, 1), bool)
        losses = [
            plain(
                x_BLD[b : b + 1, i : i + 1], output_DV, targets_BL[b : b + 1, i : i + 1], ones, 0.1
            )
            for b in range(B)
            for i in range(L)
        ]
        return jnp.sum(weight_BL.reshape(-1) * jnp.where(weight_BL.reshape(-1) > 0,
                                                         jnp.stack(losses), 0.0))  # fmt: skip

    arguments = (x_BLD, output_DV, weight_BL)
    actual = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*arguments)
    expected = jax.jit(jax.value_and_grad(wanted, argnums=(0, 1, 2)))(*arguments)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
