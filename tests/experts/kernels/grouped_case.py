"""Rows of a few experts, for the tests of kernels that fuse SwiGLU."""

import jax
import jax.numpy as jnp

from dynmoe_jax.experts import ExpertWeights

R, E, D, F = 512, 5, 128, 384


def draw(dtype=jnp.float32):
    """(x_RD, dy_RD, weight_R1, weights)."""
    keys = jax.random.split(jax.random.key(0), 5)
    x_RD, dy_RD = (jax.random.normal(k, (R, D)).astype(dtype) for k in keys[:2])
    weight_R1 = jax.random.uniform(keys[2], (R, 1))
    gate_up_ED2F = (jax.random.normal(keys[3], (E, D, 2 * F)) / 11).astype(dtype)
    down_EFD = (jax.random.normal(keys[4], (E, F, D)) / 20).astype(dtype)
    return x_RD, dy_RD, weight_R1, ExpertWeights(gate_up_ED2F, down_EFD)
