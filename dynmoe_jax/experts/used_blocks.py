"""Dropless experts of any kind, in plain JAX: a loop over the blocks of rows that are used.

What a kind computes of a block of rows of one expert is all that is known of it.  The trip count
of the loop is data, so rows beyond ``sum(group_size_E)`` and experts without rows cost nothing, on
any platform.  Backward loops over the same blocks, computes each again and adds its weights'
gradients into the place of their expert.

Axis legend: T tokens, R rows, E experts, b rows of one block, D model width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.kernels.cpu.block_matmul import gather, scatter_add
from dynmoe_jax.experts.kernels.cpu.block_schedule import NOWHERE, Schedule, block_sizes
from dynmoe_jax.experts.kinds.kind import Arrays, ExpertKind
from dynmoe_jax.experts.rows import Rows


@dataclasses.dataclass(frozen=True)
class UsedBlocks:
    """The backend for experts of a kind that kernels do not know.

    Attributes:
      kind: of the experts.
    """

    kind: ExpertKind

    def __call__(
        self, x_TD: Float[Array, "T D"], rows: Rows, weights: Arrays
    ) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
        """y_t = sum over the rows of token t of weight * expert(x_t).

        Args:
          x_TD: tokens.
          rows: which expert computes which token.
          weights: all experts, by the names of their parameters.

        Returns:
          y_TD, and the number of rows dropped (always 0 here).
        """
        y_TD = _used_blocks(
            self.kind, x_TD, rows.weight_R, dict(weights), rows.token_R, rows.group_size_E
        )
        return y_TD, jnp.zeros((), jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _used_blocks(kind, x_TD, weight_R, weights, token_R, group_size_E):
    def add_block(y_TD, e, start, token_b, weight_b):
        y_bD = kind.apply(of_expert(weights, e), rows_of(x_TD, token_b))
        return scatter_add(y_TD, token_b, y_bD.astype(jnp.float32) * weight_b[:, None])

    schedule = blocks_of(x_TD, weight_R, token_R, group_size_E)
    return schedule.fold(add_block, jnp.zeros(x_TD.shape, jnp.float32)).astype(x_TD.dtype)


def _forward(kind, x_TD, weight_R, weights, token_R, group_size_E):
    arguments = x_TD, weight_R, weights, token_R, group_size_E
    return _used_blocks(kind, *arguments), arguments


def _backward(kind, arguments, dy_TD):
    x_TD, weight_R, weights, token_R, group_size_E = arguments

    def add_block(carry, e, start, token_b, weight_b):
        dx_TD, dweight_P, dweights = carry
        y_bD, transpose = jax.vjp(kind.apply, of_expert(weights, e), rows_of(x_TD, token_b))
        dy_bD = gather(dy_TD, token_b)
        dweight_b = jnp.sum(dy_bD.astype(jnp.float32) * y_bD.astype(jnp.float32), axis=-1)
        dweight_P = jax.lax.dynamic_update_slice(dweight_P, dweight_b, (start,))
        weighed_bD = dy_bD.astype(jnp.float32) * weight_b[:, None]
        dweights_e, dx_bD = transpose(weighed_bD.astype(y_bD.dtype))
        dweights = jax.tree.map(lambda total, more: total.at[e].add(more), dweights, dweights_e)
        return scatter_add(dx_TD, token_b, dx_bD), dweight_P, dweights

    schedule = blocks_of(x_TD, weight_R, token_R, group_size_E)
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    carry = zeros(x_TD.shape), zeros(schedule.weight_P.shape)
    carry = *carry, jax.tree.map(lambda weight: zeros(weight.shape), weights)
    dx_TD, dweight_P, dweights = schedule.fold(add_block, carry)
    used_R = jnp.arange(weight_R.shape[0]) < jnp.sum(group_size_E)
    dweight_R = jnp.where(used_R, dweight_P[: weight_R.shape[0]], 0.0).astype(weight_R.dtype)
    dweights = jax.tree.map(lambda total, weight: total.astype(weight.dtype), dweights, weights)
    return dx_TD.astype(x_TD.dtype), dweight_R, dweights, None, None


_used_blocks.defvjp(_forward, _backward)


def blocks_of(
    x_TD: Float[Array, "T D"],
    weight_R: Float[Array, "R"],
    token_R: Int[Array, "R"],
    group_size_E: Int[Array, "E"],
) -> Schedule:
    """Cuts rows in blocks of every second size: each size is a kind's function compiled anew."""
    sizes = block_sizes(x_TD.shape[0])[::-2][::-1]
    return Schedule(token_R, weight_R, group_size_E, x_TD.shape[0], sizes)


def of_expert(weights: Arrays, e: Int[Array, ""]) -> Arrays:
    """The arrays of one expert."""
    return {
        name: jax.lax.dynamic_index_in_dim(array, e, keepdims=False)
        for name, array in weights.items()
    }


def rows_of(x_TD: Float[Array, "T D"], token_b: Int[Array, "b"]) -> Float[Array, "b D"]:
    """The tokens of a block; in place of rows beyond those of its expert, its first row again.

    A kind may have no finite value or derivative at zero, and 0 * NaN is NaN.
    """
    return x_TD[jnp.where(token_b == NOWHERE, token_b[0], token_b)]
