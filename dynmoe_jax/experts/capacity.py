"""Static capacity: every expert computes the same number of slots, filled or not.

The layout of GShard (arXiv 2006.16668) and Switch (arXiv 2101.03961): plain batched matrix
products, at the price of empty slots and, where an expert is chosen more often than it has slots,
of dropped rows.

Axis legend: T tokens, E experts, C slots of one expert, R rows, D model width.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights, swiglu


def capacity_of(tokens: int, row_bound: int, num_experts: int, factor: float) -> int:
    """C: ``factor`` times an even share of the R rows, at most T (an expert has no token twice)."""
    return min(tokens, math.ceil(factor * row_bound / num_experts))


def capacity_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights | Arrays,
    *,
    factor: float,
    kind: ExpertKind | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t that found a slot of weight * expert(x_t).

    A row is dropped when C earlier tokens chose the same expert; the token then goes on with what
    its other experts and the residual stream give it.

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts; by the names of their parameters if a kind is given.
      factor: see :func:`capacity_of`.
      kind: of the experts; None is SwiGLU.

    Returns:
      y_TD, and the number of rows dropped.
    """
    tokens = x_TD.shape[0]
    capacity = capacity_of(tokens, rows.token_R.shape[0], rows.group_size_E.shape[0], factor)
    slot_C = jnp.arange(capacity)
    filled_EC = slot_C < rows.group_size_E[:, None]
    # An empty slot reads past the end, which fills in zeros, and writes past the end: nowhere.
    row_EC = jnp.where(filled_EC, rows.start_E[:, None] + slot_C, rows.token_R.shape[0])
    token_EC = rows.token_R.at[row_EC].get(mode="fill", fill_value=tokens)
    weight_EC = rows.weight_R.at[row_EC].get(mode="fill", fill_value=0)
    x_ECD = x_TD.at[token_EC].get(mode="fill", fill_value=0)
    if kind is None:
        hidden_ECF = swiglu(jnp.einsum("ecd,edf->ecf", x_ECD, weights.gate_up_ED2F))
        y_ECD = jnp.einsum("ecf,efd->ecd", hidden_ECF, weights.down_EFD)
    else:
        y_ECD = jax.vmap(kind.apply)(dict(weights), x_ECD)
    y_ECD = y_ECD.astype(jnp.float32) * weight_EC[..., None]
    y_TD = jnp.zeros(x_TD.shape, jnp.float32).at[token_EC].add(y_ECD, mode="drop")
    dropped = jnp.sum(jnp.maximum(rows.group_size_E - capacity, 0), dtype=jnp.int32)
    return y_TD.astype(x_TD.dtype), dropped
