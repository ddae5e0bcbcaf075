"""Attention among the tokens of trees (:mod:`.prefix_tree`): each one sees those on its path.

Axis legend: B rows, L tokens of a row, H query heads, G key/value heads, R = H/G query heads of one
key/value head, W head width, q and k the queries and keys of one tile.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.model.attention import Attention
from dynmoe_jax.model.kernels.attention.tiled import tile_edges


def attend_in_trees(decoder: nnx.Module, ends_BL: Int[Array, "B L"]) -> None:
    """Makes every attention of a decoder look along the paths of trees.

    The rest of the model stays what it is: projections, positions, experts.

    Args:
      decoder: changed in place; a copy of its own in the trace that uses it.
      ends_BL: one past the last token below each token, in its row.
    """

    def attend(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
        del segment_ids_BL
        return tree_attention(query_BLHW, key_BLGW, value_BLGW, ends_BL)

    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, Attention):
            module.attend = attend


def tree_attention(
    query_BLHW: Float[Array, "B L H W"],
    key_BLGW: Float[Array, "B L G W"],
    value_BLGW: Float[Array, "B L G W"],
    ends_BL: Int[Array, "B L"],
) -> Float[Array, "B L H W"]:
    """Each token attends to itself and to the tokens above it; scores are float32.

    In tiles of queries, of which each meets the keys up to its end alone, as in
    :mod:`dynmoe_jax.model.kernels.attention.tiled`.
    """
    batch, length, heads, width = query_BLHW.shape
    groups = key_BLGW.shape[2]
    query_BLGRW = query_BLHW.reshape(batch, length, groups, heads // groups, width) * width**-0.5
    mixed = []
    for first, end in tile_edges(length):
        scores_BGRqk = jnp.einsum(
            "bqgrw,bkgw->bgrqk",
            query_BLGRW[:, first:end],
            key_BLGW[:, :end],
            preferred_element_type=jnp.float32,
        )
        sees_Bqk = _sees(ends_BL, first, end)[:, None, None]
        scores_BGRqk = jnp.where(sees_Bqk, scores_BGRqk, -jnp.inf)
        odds_BGRqk = jnp.exp(scores_BGRqk - jnp.max(scores_BGRqk, axis=-1, keepdims=True))
        sum_BGRq1 = jnp.sum(odds_BGRqk, axis=-1, keepdims=True)
        mixed_BGRqW = jnp.einsum(
            "bgrqk,bkgw->bgrqw",
            odds_BGRqk.astype(value_BLGW.dtype),
            value_BLGW[:, :end],
            preferred_element_type=jnp.float32,
        )
        mixed.append(jnp.moveaxis(mixed_BGRqW / sum_BGRq1, 3, 1))
    return jnp.concatenate(mixed, axis=1).reshape(query_BLHW.shape).astype(query_BLHW.dtype)


def _sees(ends_BL: Int[Array, "B L"], first: int, end: int) -> Bool[Array, "B q k"]:
    """Whether the queries ``first`` to ``end`` see the keys up to ``end``."""
    query_q1, key_k = jnp.arange(first, end)[:, None], jnp.arange(end)
    return (key_k <= query_q1) & (query_q1 < ends_BL[:, None, :end])
