"""Dropless experts on CPU by kernels of our own: products that read expert weights in place.

XLA multiplies a copy of an expert's weights, in blocks of a few static sizes, and adds to weight
gradients that start as zeros (:mod:`.blocks`, the twin).  These kernels copy what a product needs
into the cache, compute the rows there are, and write each weight gradient once.

Axis legend: T tokens, N layers, E experts, R rows, S rows saved, W rows worked on at a time, D
model width, F hidden width.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights, StackedView
from dynmoe_jax.hardware.native import library

WAVE_ROWS = 2048
"""Most rows worked on at a time: the bound on W."""

BLOCK = 64
"""Hidden units whose share of a combine weight's gradient is one sum: kFewColumns in C++."""


def native_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights,
    *,
    saved_rows_per_token: float = 2.0,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t), in float32.

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts.
      saved_rows_per_token: S / T, how many rows keep their gate and up activations for backward.

    Returns:
      y_TD, and the number of rows dropped (always 0 here).

    Raises:
      NotAvailableError: the kernels cannot be compiled here.
    """
    library.load()
    saved = rows.kept(x_TD.shape[0], saved_rows_per_token)
    stacked = weights.stacked
    weights = dataclasses.replace(weights, stacked=None)
    y_TD = _native_experts(
        saved, x_TD, rows.weight_R, weights, stacked, rows.token_R, rows.group_size_E
    )
    return y_TD, jnp.zeros((), jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native_experts(saved, x_TD, weight_R, weights, stacked, token_R, group_size_E):
    return _outputs(x_TD, weight_R, _stacked_view(weights, stacked), token_R, group_size_E, 0)[0]


def _native_experts_forward(saved, x_TD, weight_R, weights, stacked, token_R, group_size_E):
    # In a stack, the layer's own arrays are not kept: nobody reads them, so nobody copies them.
    operands = (x_TD, weight_R, _stacked_view(weights, stacked), token_R, group_size_E)
    y_TD, kept_S2F = _outputs(*operands, saved)
    return y_TD, (*operands, kept_S2F)


def _outputs(x_TD, weight_R, stacked: StackedView, token_R, group_size_E, saved: int):
    """y_TD, and the gate and up activations of the first rows."""
    hidden_width, width = stacked.down_NEFD.shape[2:]
    results = (
        _floats(x_TD.shape),
        _floats((saved, 2 * hidden_width)),
        _scratch(token_R, width + 3 * hidden_width),
    )
    call = jax.ffi.ffi_call("dynmoe_experts", results)
    y_TD, kept_S2F, _ = call(x_TD, token_R, weight_R, group_size_E, *_arrays(stacked))
    return y_TD, kept_S2F


def _native_experts_backward(saved, residuals, dy_TD):
    x_TD, weight_R, stacked, token_R, group_size_E, kept_S2F = residuals
    hidden_width, width = stacked.down_NEFD.shape[2:]
    columns = 3 * width + 5 * hidden_width + math.ceil(hidden_width / BLOCK)
    shapes = (
        x_TD.shape,
        weight_R.shape,
        stacked.gate_up_NED2F.shape[1:],
        stacked.down_NEFD.shape[1:],
    )
    results = (*map(_floats, shapes), _scratch(token_R, columns))
    call = jax.ffi.ffi_call("dynmoe_experts_gradient", results)
    operands = (x_TD, token_R, weight_R, group_size_E, *_arrays(stacked), kept_S2F, dy_TD)
    dx_TD, dweight_R, dgate_up_ED2F, ddown_EFD, _ = call(*operands)
    return dx_TD, dweight_R, ExpertWeights(dgate_up_ED2F, ddown_EFD), None, None, None


_native_experts.defvjp(_native_experts_forward, _native_experts_backward)


def _stacked_view(weights: ExpertWeights, stacked: StackedView | None) -> StackedView:
    """Returns the stack that the weights lie in, or one of their own."""
    if stacked:
        return stacked
    return StackedView(weights.gate_up_ED2F[None], weights.down_EFD[None], jnp.zeros((), jnp.int32))


def _arrays(stacked: StackedView) -> tuple[Array, Array, Array]:
    return stacked.gate_up_NED2F, stacked.down_NEFD, stacked.layer


def _floats(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _scratch(token_R: Int[Array, "R"], columns: int) -> jax.ShapeDtypeStruct:
    """Memory of the kernels, as a result that nobody reads, so that XLA places and counts it."""
    return _floats((columns, min(token_R.shape[0], WAVE_ROWS)))
