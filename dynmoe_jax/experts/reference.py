"""The oracle: every expert on every token, einsum, no cleverness.

Axis legend: T tokens, E experts, R rows, D model width, F hidden width of an expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights, swiglu


def reference_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights | Arrays,
    kind: ExpertKind | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t).

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts; by the names of their parameters if a kind is given.
      kind: of the experts; None is SwiGLU.

    Returns:
      y_TD, and the number of rows dropped (always 0 here).
    """
    tokens = x_TD.shape[0]
    # Padding rows go to a row and a column that are cut off again.
    token_R = jnp.where(rows.used_R, rows.token_R, tokens)
    weight_R = jnp.where(rows.used_R, rows.weight_R, 0.0)
    gates_TE = jnp.zeros((tokens + 1, rows.group_size_E.shape[0] + 1), jnp.float32)
    gates_TE = gates_TE.at[token_R, rows.expert_R].add(weight_R)[:-1, :-1]
    chosen_TE = jnp.zeros(gates_TE.shape, bool).at[token_R, rows.expert_R].set(True, mode="drop")
    # A token without a row may hold anything, and 0 * NaN is NaN.
    x_TD = jnp.where(jnp.any(chosen_TE, axis=-1, keepdims=True), x_TD, 0)
    if kind is None:
        hidden_TEF = swiglu(jnp.einsum("td,edf->tef", x_TD, weights.gate_up_ED2F))
        y_TED = jnp.einsum("tef,efd->ted", hidden_TEF, weights.down_EFD)
    else:
        y_TED = jax.vmap(kind.apply, in_axes=(0, None), out_axes=1)(dict(weights), x_TD)
    y_TD = jnp.einsum("te,ted->td", gates_TE, y_TED.astype(jnp.float32))
    return y_TD.astype(x_TD.dtype), jnp.zeros((), jnp.int32)
