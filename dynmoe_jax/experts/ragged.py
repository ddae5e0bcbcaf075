"""Dropless experts by grouped matrix products (``jax.lax.ragged_dot``), for accelerators.

Axis legend: T tokens, E experts, R rows, D model width, F hidden width of an expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights, swiglu


def ragged_experts(
    x_TD: Float[Array, "T D"], rows: Rows, weights: ExpertWeights
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t).

    Returns:
      y_TD, and the number of rows that found no place (always 0 here).
    """
    used_R1 = rows.used_R[:, None]
    # Masked on the way in and on the way out, with where: kernels leave rows beyond the groups
    # uninitialised, and 0 * NaN is NaN, forward as well as backward.
    x_RD = jnp.where(used_R1, x_TD[rows.token_R], 0)
    experts, width = weights.num_experts, x_TD.shape[-1]
    gate_up_EDG = weights.gate_up_ED2F.reshape(experts, width, -1)
    gate_up_RG = jax.lax.ragged_dot(x_RD, gate_up_EDG, rows.group_size_E)
    hidden_RF = swiglu(gate_up_RG.reshape(*gate_up_RG.shape[:-1], 2, -1))
    hidden_RF = jnp.where(used_R1, hidden_RF, 0)
    y_RD = jax.lax.ragged_dot(hidden_RF, weights.down_EFD, rows.group_size_E)
    weight_R = jnp.where(rows.used_R, rows.weight_R, 0.0)
    y_RD = jnp.where(used_R1, y_RD, 0).astype(jnp.float32) * weight_R[:, None]
    y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[rows.token_R].add(y_RD)
    return y_TD.astype(x_TD.dtype), jnp.zeros((), jnp.int32)
