"""Causal attention within segments in tiles of queries, for CPU.

XLA's own attention holds the scores of all pairs of positions, computes those above the diagonal
only to mask them, and keeps the probabilities for backward.  Here a tile of queries meets the keys
up to its end alone, and backward recomputes its probabilities from the log-sum-exp of each row
(as in FlashAttention, arXiv 2205.14135, equations of section 3 and appendix B).

Axis legend: B batch, L positions, H query heads, G key/value heads, R = H/G query heads of one
key/value head, W head width, q and k the queries and keys of one tile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

TILES = 8
"""Tiles of one sequence.  n tiles compute (n + 1) / 2n of all pairs; more of them are faster, and
take longer to compile (docs/measurements.md: cpu-attention-tiles)."""

SMALLEST_TILE = 64


def tiled_attention(
    query_BLHW: Float[Array, "B L H W"],
    key_BLGW: Float[Array, "B L G W"],
    value_BLGW: Float[Array, "B L G W"],
    segment_ids_BL: Int[Array, "B L"],
) -> Float[Array, "B L H W"]:
    """Each position attends to those of its own segment up to itself; scores are float32."""
    batch, length, heads, width = query_BLHW.shape
    groups = key_BLGW.shape[2]
    query_BLGRW = query_BLHW.reshape(batch, length, groups, heads // groups, width)
    query_BGRLW = jnp.moveaxis(query_BLGRW, 1, 3) * width**-0.5
    key_BGLW, value_BGLW = jnp.moveaxis(key_BLGW, 1, 2), jnp.moveaxis(value_BLGW, 1, 2)
    mixed_BGRLW = _tiled_attention(query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL)
    return jnp.moveaxis(mixed_BGRLW, 3, 1).reshape(query_BLHW.shape)


def tile_edges(length: int) -> list[tuple[int, int]]:
    """(first, end) of each tile of queries; the last one may be smaller."""
    size = max(SMALLEST_TILE, -(-length // TILES))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


@jax.custom_vjp
def _tiled_attention(query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL):
    return _tiled_attention_forward(query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL)[0]


def _tiled_attention_forward(query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL):
    mixed, log_sums = [], []
    for first, end in tile_edges(query_BGRLW.shape[3]):
        scores_BGRqk = _scores(query_BGRLW, key_BGLW, segment_ids_BL, first, end)
        most_BGRq1 = jnp.max(scores_BGRqk, axis=-1, keepdims=True)
        odds_BGRqk = jnp.exp(scores_BGRqk - most_BGRq1)
        sum_BGRq1 = jnp.sum(odds_BGRqk, axis=-1, keepdims=True)
        value_BGkW = value_BGLW[:, :, :end]
        mixed_BGRqW = _product("bgrqk,bgkw->bgrqw", odds_BGRqk.astype(value_BGLW.dtype), value_BGkW)
        mixed.append((mixed_BGRqW / sum_BGRq1).astype(query_BGRLW.dtype))
        log_sums.append(most_BGRq1 + jnp.log(sum_BGRq1))
    mixed_BGRLW = jnp.concatenate(mixed, axis=3)
    log_sum_BGRL1 = jnp.concatenate(log_sums, axis=3)
    residuals = query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL, mixed_BGRLW, log_sum_BGRL1
    return mixed_BGRLW, residuals


def _tiled_attention_backward(residuals, dmixed_BGRLW):
    query_BGRLW, key_BGLW, value_BGLW, segment_ids_BL, mixed_BGRLW, log_sum_BGRL1 = residuals
    dtype = query_BGRLW.dtype
    log_sum_BGR1L = jnp.swapaxes(log_sum_BGRL1, -1, -2)
    # <dprobs, probs> of a row is <dmixed, mixed>.
    delta_BGR1L = jnp.sum(dmixed_BGRLW.astype(jnp.float32) * mixed_BGRLW, axis=-1)[..., None, :]
    dquery = []
    dkey_BGLW = jnp.zeros(key_BGLW.shape, jnp.float32)
    dvalue_BGLW = jnp.zeros(value_BGLW.shape, jnp.float32)
    for first, end in tile_edges(query_BGRLW.shape[3]):
        query_BGRqW, dmixed_BGRqW = query_BGRLW[..., first:end, :], dmixed_BGRLW[..., first:end, :]
        key_BGkW, value_BGkW = key_BGLW[..., :end, :], value_BGLW[..., :end, :]
        # Keys by queries: two of the three products that follow then need no transpose.
        scores_BGRkq = _product("bgkw,bgrqw->bgrkq", key_BGkW, query_BGRqW)
        mask_B11kq = jnp.swapaxes(_mask(segment_ids_BL, first, end), -1, -2)
        probs_BGRkq = jnp.exp(scores_BGRkq - log_sum_BGR1L[..., first:end])
        probs_BGRkq = jnp.where(mask_B11kq, probs_BGRkq, 0.0)
        dprobs_BGRkq = _product("bgkw,bgrqw->bgrkq", value_BGkW, dmixed_BGRqW)
        dscores_BGRkq = probs_BGRkq * (dprobs_BGRkq - delta_BGR1L[..., first:end])
        dscores_BGRkq = dscores_BGRkq.astype(dtype)
        dquery.append(_product("bgrkq,bgkw->bgrqw", dscores_BGRkq, key_BGkW))
        dkey_BGkW = _product("bgrkq,bgrqw->bgkw", dscores_BGRkq, query_BGRqW)
        dvalue_BGkW = _product("bgrkq,bgrqw->bgkw", probs_BGRkq.astype(dtype), dmixed_BGRqW)
        dkey_BGLW = dkey_BGLW.at[:, :, :end].add(dkey_BGkW)
        dvalue_BGLW = dvalue_BGLW.at[:, :, :end].add(dvalue_BGkW)
    dquery_BGRLW = jnp.concatenate(dquery, axis=3)
    gradients = (dquery_BGRLW, dkey_BGLW, dvalue_BGLW)
    return *(gradient.astype(dtype) for gradient in gradients), None


_tiled_attention.defvjp(_tiled_attention_forward, _tiled_attention_backward)


def _scores(query_BGRLW, key_BGLW, segment_ids_BL, first: int, end: int):
    """Scores of the queries of a tile and the keys up to its end; -inf where none is attended."""
    query_BGRqW, key_BGkW = query_BGRLW[:, :, :, first:end], key_BGLW[:, :, :end]
    scores_BGRqk = _product("bgrqw,bgkw->bgrqk", query_BGRqW, key_BGkW)
    return jnp.where(_mask(segment_ids_BL, first, end), scores_BGRqk, -jnp.inf)


def _mask(segment_ids_BL: Int[Array, "B L"], first: int, end: int) -> Bool[Array, "B 1 1 q k"]:
    same_Bqk = segment_ids_BL[:, first:end, None] == segment_ids_BL[:, None, :end]
    causal_qk = jnp.arange(first, end)[:, None] >= jnp.arange(end)
    return (same_Bqk & causal_qk)[:, None, None]


def _product(axes: str, left: Array, right: Array) -> Array:
    return jnp.einsum(axes, left, right, preferred_element_type=jnp.float32)
