"""Attention on NVIDIA GPUs by kernels of our own; :mod:`.tiled` is the twin in JAX.

FlashAttention-2 (arXiv 2307.08691) with segments.  cuDNN is told of segments by an additive mask
[B, 1, L, L] alone, whose gradient JAX asks of it besides (jax 0.10.2; packed sequences are in
private functions), in every layer (docs/measurements.md: h100-mask-gradient).  Here tiles that
share no segment are not visited, and nothing of size L^2 exists.  Backward visits the pairs twice,
once for queries and once for keys and values, so that nothing is added up in an order that changes
from run to run.

Axis legend: B batch, L positions, H query heads, G key/value heads, W head width, I tiles of
queries, J tiles of keys, q queries and k keys of a tile.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.hardware.triton import dot, options

_NOWHERE = -1e30
"""A score of pairs that do not attend: exp2 of it is 0, and of its difference to itself 1, which
the first score of a pair that does takes back to 0."""


@dataclasses.dataclass(frozen=True)
class AttentionTile:
    """Queries and keys of a tile, and what computes it."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD = AttentionTile(128, 64, 8, 3)
TO_KEYS = AttentionTile(64, 64, 4, 3)
TO_QUERIES = AttentionTile(128, 64, 8, 3)
"""Each step of a program waits for the one before it, so two programs have to share an SM and its
registers (docs/measurements.md: h100-attention-registers)."""


def triton_attention(
    query_BLHW: Float[Array, "B L H W"],
    key_BLGW: Float[Array, "B L G W"],
    value_BLGW: Float[Array, "B L G W"],
    segment_ids_BL: Int[Array, "B L"],
    *,
    interpret: bool = False,
) -> Float[Array, "B L H W"]:
    """Each position attends to those of its own segment up to itself.

    L is a multiple of 128, and W is 32, 64 or 128.

    Args:
      query_BLHW: queries.
      key_BLGW: keys; G divides H.
      value_BLGW: values.
      segment_ids_BL: of each position.
      interpret: run the kernels on a CPU, slowly, for tests.
    """
    return _triton_attention(interpret, query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _triton_attention(interpret, query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    return _triton_attention_forward(interpret, query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)[0]


def _triton_attention_forward(interpret, query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    batch, length, heads, _ = query_BLHW.shape
    tile = FORWARD
    first_BI, _ = spans(segment_ids_BL, tile.queries, tile.keys)
    mixed_BLHW, log_sum_BHL = pl.pallas_call(
        partial(_forward_kernel, tile=tile, shape=_Shape.of(query_BLHW, key_BLGW)),
        out_shape=(
            jax.ShapeDtypeStruct(query_BLHW.shape, query_BLHW.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        grid=(length // tile.queries, batch * heads),
        name="attention_forward",
        **options(tile.warps, tile.stages, interpret),
    )(first_BI, segment_ids_BL, query_BLHW, key_BLGW, value_BLGW)
    residuals = query_BLHW, key_BLGW, value_BLGW, segment_ids_BL, mixed_BLHW, log_sum_BHL
    return mixed_BLHW, residuals


def _triton_attention_backward(interpret, residuals, dmixed_BLHW):
    query_BLHW, key_BLGW, value_BLGW, segment_ids_BL, mixed_BLHW, log_sum_BHL = residuals
    (batch, length, heads, _), kv_heads = query_BLHW.shape, key_BLGW.shape[2]
    # The sum over keys of probability times its gradient.
    product_BLHW = mixed_BLHW.astype(jnp.float32) * dmixed_BLHW.astype(jnp.float32)
    delta_BHL = jnp.swapaxes(jnp.sum(product_BLHW, axis=-1), 1, 2)
    operands = query_BLHW, key_BLGW, value_BLGW, dmixed_BLHW, log_sum_BHL, delta_BHL
    shape = _Shape.of(query_BLHW, key_BLGW)
    _, last_BJ = spans(segment_ids_BL, TO_KEYS.queries, TO_KEYS.keys)
    dkey_BLGW, dvalue_BLGW = pl.pallas_call(
        partial(_to_keys_kernel, tile=TO_KEYS, shape=shape),
        out_shape=tuple(jax.ShapeDtypeStruct(key_BLGW.shape, key_BLGW.dtype) for _ in range(2)),
        grid=(length // TO_KEYS.keys, batch * kv_heads),
        name="attention_to_keys",
        **options(TO_KEYS.warps, TO_KEYS.stages, interpret),
    )(last_BJ, segment_ids_BL, *operands)
    first_BI, _ = spans(segment_ids_BL, TO_QUERIES.queries, TO_QUERIES.keys)
    dquery_BLHW = pl.pallas_call(
        partial(_to_queries_kernel, tile=TO_QUERIES, shape=shape),
        out_shape=jax.ShapeDtypeStruct(query_BLHW.shape, query_BLHW.dtype),
        grid=(length // TO_QUERIES.queries, batch * heads),
        name="attention_to_queries",
        **options(TO_QUERIES.warps, TO_QUERIES.stages, interpret),
    )(first_BI, segment_ids_BL, *operands)
    return dquery_BLHW, dkey_BLGW, dvalue_BLGW, None


_triton_attention.defvjp(_triton_attention_forward, _triton_attention_backward)


def spans(
    segment_ids_BL: Int[Array, "B L"], queries: int, keys: int
) -> tuple[Int[Array, "B I"], Int[Array, "B J"]]:
    """First tile of keys that a tile of queries visits, and the last of queries one of keys.

    Tiles whose ranges of segments overlap might share one; ids may stand in any order.
    """
    low_BI, high_BI = _ranges(segment_ids_BL, queries)
    low_BJ, high_BJ = _ranges(segment_ids_BL, keys)
    share_BIJ = (low_BI[:, :, None] <= high_BJ[:, None]) & (low_BJ[:, None] <= high_BI[:, :, None])
    first_BI = jnp.argmax(share_BIJ, axis=2)
    last_BJ = low_BI.shape[1] - 1 - jnp.argmax(share_BIJ[:, ::-1], axis=1)
    return first_BI.astype(jnp.int32), last_BJ.astype(jnp.int32)


def _ranges(segment_ids_BL, size):
    tiles = segment_ids_BL.reshape(segment_ids_BL.shape[0], -1, size)
    return jnp.min(tiles, axis=2), jnp.max(tiles, axis=2)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Numbers of heads and their width: H, G and W."""

    heads: int
    kv_heads: int
    width: int

    @classmethod
    def of(cls, query_BLHW, key_BLGW):
        return cls(query_BLHW.shape[2], key_BLGW.shape[2], query_BLHW.shape[3])

    @property
    def scale(self) -> float:
        """Factor of scores, which are logarithms to base 2."""
        return math.log2(math.e) / math.sqrt(self.width)

    @property
    def sharing(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.kv_heads


def _forward_kernel(
    first_BI, segment_BL, query_BLHW, key_BLGW, value_BLGW, mixed_BLHW, log_sum_BHL, *, tile, shape
):
    i, (b, h) = pl.program_id(0), _batch_and_head(shape.heads)
    g, q = h // shape.sharing, _positions(i, tile.queries)
    query_qW, segment_q = _rows(query_BLHW, b, q, h), plgpu.load(segment_BL.at[b, q])

    def visit(j, carry):
        most_q, sum_q, mixed_qW = carry
        k = _positions(j, tile.keys)
        score_qk = dot(query_qW, _rows(key_BLGW, b, k, g), trans_b=True) * shape.scale
        attends_qk = _attends(q, segment_q, k, plgpu.load(segment_BL.at[b, k]))
        score_qk = jnp.where(attends_qk, score_qk, _NOWHERE)
        more_q = jnp.maximum(most_q, jnp.max(score_qk, axis=1))
        share_q = jnp.exp2(most_q - more_q)
        prob_qk = jnp.exp2(score_qk - more_q[:, None])
        value_kW = _rows(value_BLGW, b, k, g)
        mixed_qW = mixed_qW * share_q[:, None] + dot(prob_qk.astype(value_kW.dtype), value_kW)
        return more_q, sum_q * share_q + jnp.sum(prob_qk, axis=1), mixed_qW

    start = (
        jnp.full(tile.queries, _NOWHERE, jnp.float32),
        jnp.zeros(tile.queries, jnp.float32),
        jnp.zeros((tile.queries, shape.width), jnp.float32),
    )
    end = pl.cdiv((i + 1) * tile.queries, tile.keys)
    most_q, sum_q, mixed_qW = jax.lax.fori_loop(first_BI[b, i], end, visit, start)
    _store(mixed_BLHW, b, q, h, mixed_qW / sum_q[:, None])
    plgpu.store(log_sum_BHL.at[b, h, q], most_q + jnp.log2(sum_q))


def _to_keys_kernel(
    last_BJ, segment_BL, query_BLHW, key_BLGW, value_BLGW, dmixed_BLHW, log_sum_BHL, delta_BHL,
    dkey_BLGW, dvalue_BLGW, *, tile, shape
):  # fmt: skip
    j, (b, g) = pl.program_id(0), _batch_and_head(shape.kv_heads)
    k = _positions(j, tile.keys)
    key_kW, value_kW = _rows(key_BLGW, b, k, g), _rows(value_BLGW, b, k, g)
    segment_k = plgpu.load(segment_BL.at[b, k])
    first = j * tile.keys // tile.queries
    count = last_BJ[b, j] + 1 - first

    def visit(n, carry):
        # Tiles of queries of one head after the other.
        dkey_kW, dvalue_kW = carry
        h, q = g * shape.sharing + n // count, _positions(first + n % count, tile.queries)
        query_qW, dmixed_qW = _rows(query_BLHW, b, q, h), _rows(dmixed_BLHW, b, q, h)
        score_kq = dot(key_kW, query_qW, trans_b=True) * shape.scale
        attends_qk = _attends(q, plgpu.load(segment_BL.at[b, q]), k, segment_k)
        log_sum_q, delta_q = (plgpu.load(x.at[b, h, q]) for x in (log_sum_BHL, delta_BHL))
        prob_kq = jnp.where(attends_qk.T, jnp.exp2(score_kq - log_sum_q[None, :]), 0.0)
        dvalue_kW += dot(prob_kq.astype(dmixed_qW.dtype), dmixed_qW)
        dprob_kq = dot(value_kW, dmixed_qW, trans_b=True)
        dscore_kq = prob_kq * (dprob_kq - delta_q[None, :])
        return dkey_kW + dot(dscore_kq.astype(query_qW.dtype), query_qW), dvalue_kW

    zeros_kW = jnp.zeros((tile.keys, shape.width), jnp.float32)
    sums = jax.lax.fori_loop(0, count * shape.sharing, visit, (zeros_kW, zeros_kW))
    dkey_kW, dvalue_kW = sums
    _store(dkey_BLGW, b, k, g, dkey_kW / math.sqrt(shape.width))
    _store(dvalue_BLGW, b, k, g, dvalue_kW)


def _to_queries_kernel(
    first_BI, segment_BL, query_BLHW, key_BLGW, value_BLGW, dmixed_BLHW, log_sum_BHL, delta_BHL,
    dquery_BLHW, *, tile, shape
):  # fmt: skip
    i, (b, h) = pl.program_id(0), _batch_and_head(shape.heads)
    g, q = h // shape.sharing, _positions(i, tile.queries)
    query_qW, dmixed_qW = _rows(query_BLHW, b, q, h), _rows(dmixed_BLHW, b, q, h)
    segment_q = plgpu.load(segment_BL.at[b, q])
    log_sum_q, delta_q = (plgpu.load(x.at[b, h, q]) for x in (log_sum_BHL, delta_BHL))

    def visit(j, dquery_qW):
        k = _positions(j, tile.keys)
        key_kW, value_kW = _rows(key_BLGW, b, k, g), _rows(value_BLGW, b, k, g)
        score_qk = dot(query_qW, key_kW, trans_b=True) * shape.scale
        attends_qk = _attends(q, segment_q, k, plgpu.load(segment_BL.at[b, k]))
        prob_qk = jnp.where(attends_qk, jnp.exp2(score_qk - log_sum_q[:, None]), 0.0)
        dprob_qk = dot(dmixed_qW, value_kW, trans_b=True)
        dscore_qk = prob_qk * (dprob_qk - delta_q[:, None])
        return dquery_qW + dot(dscore_qk.astype(key_kW.dtype), key_kW)

    zeros_qW = jnp.zeros((tile.queries, shape.width), jnp.float32)
    end = pl.cdiv((i + 1) * tile.queries, tile.keys)
    dquery_qW = jax.lax.fori_loop(first_BI[b, i], end, visit, zeros_qW)
    _store(dquery_BLHW, b, q, h, dquery_qW / math.sqrt(shape.width))


def _batch_and_head(heads: int) -> tuple[Array, Array]:
    program = pl.program_id(1)
    return program // heads, program % heads


def _positions(tile: Array, size: int) -> Int[Array, "size"]:
    """Positions of a tile."""
    return tile * size + jnp.arange(size)


def _attends(
    q: Int[Array, "q"], segment_q: Int[Array, "q"], k: Int[Array, "k"], segment_k: Int[Array, "k"]
) -> Bool[Array, "q k"]:
    return (q[:, None] >= k[None, :]) & (segment_q[:, None] == segment_k[None, :])


def _rows(x_BLHW: Any, b: Array, positions: Int[Array, "q"], h: Array) -> Float[Array, "q W"]:
    """Loads some positions of a head."""
    return plgpu.load(_at(x_BLHW, b, positions, h))


def _store(x_BLHW: Any, b: Array, positions: Int[Array, "q"], h: Array, x_qW: Array) -> None:
    plgpu.store(_at(x_BLHW, b, positions, h), x_qW.astype(x_BLHW.dtype))


def _at(x_BLHW, b, positions, h):
    return x_BLHW.at[b, positions[:, None], h, jnp.arange(x_BLHW.shape[3])[None, :]]
