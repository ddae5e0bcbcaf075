"""Dropless experts on CPU: a loop over the blocks of rows that are really used.

Off TPU, ``lax.ragged_dot`` lowers to a dense product over all experts, many times slower
(docs/measurements.md: cpu-ragged-dot).  A loop whose trip count is data costs what was chosen: rows
beyond ``sum(group_size_E)`` are never touched, neither are experts without rows.

The tokens of a block are gathered, sent through their expert and added to the output.  Forward
keeps the gate and up activations of the first S rows for backward: a bound of its own, so that
memory does not follow the static bound R.  Backward recomputes those of later rows, and adds
weight gradients where they finally stand.

Axis legend: T tokens, E experts, R rows, S rows saved, b rows of one block, D model width, F
hidden width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.kernels.cpu.block_matmul import (
    add_to_expert,
    expert,
    gather,
    scatter_add,
    times_expert,
)
from dynmoe_jax.experts.kernels.cpu.block_schedule import Schedule
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights, swiglu


def block_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights,
    *,
    saved_rows_per_token: float = 2.0,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t).

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts.
      saved_rows_per_token: S / T, how many rows keep their gate and up activations for backward.

    Returns:
      y_TD, and the number of rows dropped (always 0 here).
    """
    saved = rows.kept(x_TD.shape[0], saved_rows_per_token)
    y_TD = _block_experts(saved, x_TD, rows.weight_R, weights, rows.token_R, rows.group_size_E)
    return y_TD, jnp.zeros((), jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_experts(saved, x_TD, weight_R, weights, token_R, group_size_E):
    schedule = Schedule(token_R, weight_R, group_size_E, x_TD.shape[0])
    return _outputs(x_TD, weights, schedule, 0)[0]


def _block_experts_forward(saved, x_TD, weight_R, weights, token_R, group_size_E):
    schedule = Schedule(token_R, weight_R, group_size_E, x_TD.shape[0])
    y_TD, gate_up_S2F = _outputs(x_TD, weights, schedule, saved)
    return y_TD, (x_TD, weight_R, weights, token_R, group_size_E, gate_up_S2F)


def _outputs(x_TD, weights, schedule: Schedule, saved: int):
    """y_TD, and the gate and up activations of the first rows (None if ``saved`` is 0)."""
    gate_up_ED2F = weights.gate_up_ED2F
    spare = schedule.sizes[-1]

    def add_block(carry, e, start, token_b, weight_b):
        y_TD, gate_up_S2F = carry
        gate_up_b2F = times_expert(gather(x_TD, token_b), gate_up_ED2F, e)
        if saved:
            # Blocks not to be kept go behind the last one that is.  A cond would copy S rows.
            offset = (jnp.where(start < saved, start, saved + spare), 0)
            gate_up_S2F = jax.lax.dynamic_update_slice(gate_up_S2F, gate_up_b2F, offset)
        y_bD = times_expert(swiglu(gate_up_b2F), weights.down_EFD, e)
        y_bD = y_bD.astype(jnp.float32) * weight_b[:, None]
        return scatter_add(y_TD, token_b, y_bD), gate_up_S2F

    y_TD = jnp.zeros(x_TD.shape, jnp.float32)
    gate_up_S2F = None
    if saved:
        everything = saved == schedule.token_P.shape[0] - spare
        kept = saved + (spare if everything else 2 * spare)
        gate_up_S2F = jnp.zeros((kept, gate_up_ED2F.shape[2]), x_TD.dtype)
    y_TD, gate_up_S2F = schedule.fold(add_block, (y_TD, gate_up_S2F))
    return y_TD.astype(x_TD.dtype), gate_up_S2F


def _block_experts_backward(saved, residuals, dy_TD):
    x_TD, weight_R, weights, token_R, group_size_E, gate_up_S2F = residuals
    schedule = Schedule(token_R, weight_R, group_size_E, x_TD.shape[0])
    gate_up_ED2F = weights.gate_up_ED2F

    def activations(x_bD, e, start):
        def recall():
            size = (x_bD.shape[0], gate_up_ED2F.shape[2])
            return jax.lax.dynamic_slice(gate_up_S2F, (start, 0), size)

        def recompute():
            if saved == weight_R.shape[0]:
                return jnp.zeros((x_bD.shape[0], gate_up_ED2F.shape[2]), x_bD.dtype)  # never taken
            return times_expert(x_bD, gate_up_ED2F, e)

        # A cond although all rows may be saved: XLA fuses a bare slice into the element-wise
        # arithmetic, which then is not vectorised (docs/measurements.md: cpu-fused-slice).
        return recompute() if saved == 0 else jax.lax.cond(start < saved, recall, recompute)

    def add_block(carry, e, start, token_b, weight_b):
        dx_TD, dweight_P, dgate_up_ED2F, ddown_EFD = carry
        x_bD, dy_bD = gather(x_TD, token_b), gather(dy_TD, token_b)
        gate_up_b2F = activations(x_bD, e, start)
        hidden_bF, dhidden_bF = swiglu(gate_up_b2F), dy_bD @ expert(weights.down_EFD, e).T
        # <dy, hidden down> = <dy down^T, hidden>: the combine weight's gradient needs no product
        # of its own.
        dweight_b = jnp.sum((dhidden_bF * hidden_bF).astype(jnp.float32), axis=-1)
        dweight_P = jax.lax.dynamic_update_slice(dweight_P, dweight_b, (start,))
        weight_b1 = weight_b[:, None].astype(x_bD.dtype)
        ddown_EFD = add_to_expert(ddown_EFD, e, hidden_bF.T @ (dy_bD * weight_b1))
        dgate_up_b2F = _dgate_up(gate_up_b2F, dhidden_bF * weight_b1)
        dgate_up_ED2F = add_to_expert(dgate_up_ED2F, e, x_bD.T @ dgate_up_b2F)
        dx_TD = scatter_add(dx_TD, token_b, dgate_up_b2F @ expert(gate_up_ED2F, e).T)
        return dx_TD, dweight_P, dgate_up_ED2F, ddown_EFD

    carry = (
        jnp.zeros(x_TD.shape, jnp.float32),
        jnp.zeros(schedule.weight_P.shape, jnp.float32),
        jnp.zeros(gate_up_ED2F.shape, jnp.float32),
        jnp.zeros(weights.down_EFD.shape, jnp.float32),
    )
    dx_TD, dweight_P, dgate_up_ED2F, ddown_EFD = schedule.fold(add_block, carry)
    used_R = jnp.arange(weight_R.shape[0]) < jnp.sum(group_size_E)
    dweight_R = jnp.where(used_R, dweight_P[: weight_R.shape[0]], 0.0)
    dtype = x_TD.dtype
    dweights = ExpertWeights(dgate_up_ED2F.astype(dtype), ddown_EFD.astype(dtype))
    return dx_TD.astype(dtype), dweight_R, dweights, None, None


_block_experts.defvjp(_block_experts_forward, _block_experts_backward)


def _dgate_up(gate_up_b2F: Float[Array, "b 2*F"], dhidden_bF: Float[Array, "b F"]):
    """Gradient of the gate and up activations."""
    gate_bF, up_bF = jnp.split(gate_up_b2F, 2, axis=-1)
    sigmoid_bF = jax.nn.sigmoid(gate_bF)
    silu_bF = gate_bF * sigmoid_bF
    dgate_bF = dhidden_bF * up_bF * (sigmoid_bF + silu_bF * (1 - sigmoid_bF))
    return jnp.concatenate([dgate_bF, dhidden_bF * silu_bF], axis=-1)
