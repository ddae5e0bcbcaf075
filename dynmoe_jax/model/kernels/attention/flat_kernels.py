"""Kernel bodies of :mod:`.flat`: what one TPU core does for the heads of one block of lanes.

A block holds whole sequences of P lanes: one head, or P/W narrow ones side by side.  Everything is
in VMEM, so a program reads and writes each array once.  Tiles of scores stand as [keys,
queries]: what belongs to a query (maximum, sum, delta) is then one row, and rows cost the vector
units an eighth of columns.  A tile above the diagonal is never computed, nor a quarter of one that
it runs through, nor a tile whose queries and keys have no segment in common.

Two narrow heads share lanes without being cut apart: one head keeps its lanes, and what stands on
the others adds nothing, so a product over all P lanes is the product of that head.  In scores it is
the segments that stand there (:func:`_segment_codes`): the product that makes a score masks it too,
which saves the vector units a comparison and a selection for every pair.

A matrix unit holds one operand, a tile of 128 x 128 (256 x 256 on v6e), and streams the rows of the
other through it.  A head of 64 that is contracted or held leaves half of it idle, on v6e three
quarters; one that is streamed costs its 64 rows, or what it takes to latch the other operand, which
on v6e is more (docs/measurements.md: tpu-latching).  So only scores and dprobs, which contract over
W, are filled up.  All else streams transposed heads, [W, .], past tiles of scores
(docs/measurements.md: tpu-attention-backward).

Arrays in scratch memory are transposed where rows are what a product or a rotary position needs:
the partner of a row is another row, not a lane that must be shuffled into place.

Axis legend: L positions, P lanes of a block, H heads of a block, W head width, R rows of values and
of ones below them, q and k the queries and keys of one tile, O lanes that all have the same.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dynmoe_jax.hardware.target import TPU_LANES
from dynmoe_jax.model.kernels.attention.flat_heads import Heads, Part

MASKED = -1e30
"""Score of a pair that does not attend; finite, so that no difference is NaN."""

LN_2 = math.log(2.0)
ID_BITS = 32
"""Bits of a segment id."""

SUM_ROWS = 16
"""Rows of ones below the values, so that the product that mixes values also adds up the odds: one
is enough, and 16 are what bfloat16 is tiled by."""


def rotated(heads: Heads, x_Pq: jax.Array, angle_Pq: jax.Array | None, sign: float = 1.0):
    """Rotary positions of float32 queries or keys; ``sign=-1`` rotates back.

    Args:
      heads: how they lie.
      x_Pq: transposed queries or keys: the partner of a row is another row, not a lane.
      angle_Pq: cosines in the first half of the rows, sines in the second; None: nothing to rotate.
      sign: of the angles.
    """
    if angle_Pq is None:
        return x_Pq
    half, rotated_rows = heads.width // 2, []
    cos, sin = angle_Pq[:half], sign * angle_Pq[heads.lanes // 2 :][:half]
    for start in range(0, heads.lanes, heads.width):
        first, second = x_Pq[start:][:half], x_Pq[start + half :][:half]
        rotated_rows += [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated_rows, axis=0)


def forward(
    heads: Heads,
    bound_ref,
    segment_ref,
    angle_ref,
    query_ref,
    key_ref,
    value_ref,
    mixed_ref,
    log_sum_ref,
    segment_LO,
    query_HPL,
    key_HLP,
    value_HRL,
    most_Hq,
    mixed_HRq,
):
    """Mixed values, and the log-sum-exp of each query's scores, to base 2."""
    heads, dtype = dataclasses.replace(heads, block=pl.program_id(2)), query_ref.dtype
    bound_ref, each = bound_ref.at[:, pl.program_id(0)], range(heads.side_by_side)
    if heads.side_by_side == 1:
        _segments_as_columns(segment_ref, segment_LO)
    value_HRL[:, heads.width :] = jnp.ones_like(value_HRL[:, heads.width :])

    def prepare(tile):
        at = heads.span(tile)
        _rotate_queries_and_keys(
            heads, at, angle_ref, segment_ref, query_ref, key_ref, query_HPL, key_HLP
        )
        value_Pk = value_ref[0, at].T
        for head in each:
            value_HRL[head, : heads.width, at] = value_Pk[heads.rows(head)]

    _each(0, heads.tiles, prepare)

    def mix_pair(key_tile, tile, diagonal):
        parts = [(head, part) for part in heads.parts(key_tile, tile, diagonal) for head in each]
        # All scores come first: the exponentials of one head hide the products of another.
        scores = [
            _scores(heads, head, part, segment_ref, segment_LO, query_HPL, key_HLP)
            for head, part in parts
        ]
        for (head, part), score_kq in zip(parts, scores, strict=True):
            most_1q = jnp.max(score_kq, axis=0, keepdims=True)
            if not diagonal:
                before_1q = most_Hq[head : head + 1, part.columns]
                most_1q = jnp.maximum(most_1q, before_1q)
            odds_kq = jnp.exp2(score_kq - most_1q).astype(dtype)
            mixed_Rq = _product(value_HRL[heads.key_head(head), :, part.keys], odds_kq)
            if not diagonal:
                mixed_Rq += mixed_HRq[head, :, part.columns] * jnp.exp2(before_1q - most_1q)
            most_Hq[head : head + 1, part.columns] = most_1q
            mixed_HRq[head, :, part.columns] = mixed_Rq

    def mix(tile):
        at, mixed = heads.span(tile), []
        mix_pair(tile, tile, diagonal=True)

        def of_keys(key_tile):
            @pl.when(_meet(bound_ref, key_tile, tile))
            def _():
                mix_pair(key_tile, tile, diagonal=False)

        _each(0, tile, of_keys)
        for head in each:
            sum_1q = mixed_HRq[head, heads.width : heads.width + 1]
            mixed.append(mixed_HRq[head, : heads.width] / sum_1q)
            log_sum_ref[0, 0, head : head + 1, at] = most_Hq[head : head + 1] + jnp.log2(sum_1q)
        mixed_ref[0, at] = jnp.concatenate(mixed, axis=0).T.astype(dtype)

    _each(0, heads.tiles, mix)


def backward(
    heads: Heads,
    bound_ref,
    segment_ref,
    angle_ref,
    query_ref,
    key_ref,
    value_ref,
    mixed_ref,
    log_sum_ref,
    dmixed_ref,
    dquery_ref,
    dkey_ref,
    dvalue_ref,
    segment_LO,
    query_HPL,
    key_HLP,
    key_PL,
    dmixed_HPL,
    delta_HL,
    dquery_PL,
    dkey_PL,
    dvalue_PL,
):
    """Gradients, from probabilities that are computed again: five products for each tile."""
    heads, dtype = dataclasses.replace(heads, block=pl.program_id(2)), query_ref.dtype
    bound_ref, each = bound_ref.at[:, pl.program_id(0)], range(heads.side_by_side)
    if heads.side_by_side == 1:
        _segments_as_columns(segment_ref, segment_LO)
    dquery_PL[...] = jnp.zeros_like(dquery_PL)

    @pl.when(heads.block == 0)
    def _():
        dkey_PL[...] = jnp.zeros_like(dkey_PL)
        dvalue_PL[...] = jnp.zeros_like(dvalue_PL)

    def prepare(tile):
        at = heads.span(tile)
        key_PL[:, at] = _rotate_queries_and_keys(
            heads, at, angle_ref, segment_ref, query_ref, key_ref, query_HPL, key_HLP
        )
        dmixed_Pq = dmixed_ref[0, at].T
        # <dprobs, probs> of a query is <dmixed, mixed>.
        delta_Pq = dmixed_Pq.astype(jnp.float32) * mixed_ref[0, at].T.astype(jnp.float32)
        for head in each:
            dmixed_Wq, delta_Wq = dmixed_Pq[heads.rows(head)], delta_Pq[heads.rows(head)]
            _beside(heads, head, at, dmixed_HPL, dmixed_Wq, jnp.zeros_like(dmixed_Wq))
            delta_HL[head : head + 1, at] = jnp.sum(delta_Wq, axis=0, keepdims=True)

    _each(0, heads.tiles, prepare)

    def add_part(head, part):
        keys, at = part.keys, part.queries
        score_kq = _scores(heads, head, part, segment_ref, segment_LO, query_HPL, key_HLP)
        probs_kq = jnp.exp2(score_kq - log_sum_ref[0, 0, head : head + 1, at])
        dprobs_kq = _product(value_ref[0, keys], dmixed_HPL[head, :, at])
        dscore_kq = (probs_kq * (dprobs_kq - delta_HL[head : head + 1, at])).astype(dtype)
        probs_kq = probs_kq.astype(dtype)
        rows, key_rows = heads.rows(head), heads.key_rows(head)
        dmixed_Wq, query_Wq = dmixed_HPL[head, key_rows, at], query_HPL[head, key_rows, at]
        dvalue_PL[key_rows, keys] += _product(dmixed_Wq, probs_kq, transposed=True)
        dkey_PL[key_rows, keys] += _product(query_Wq, dscore_kq, transposed=True)
        dquery_PL[rows, at] += _product(key_PL[key_rows, keys], dscore_kq)

    def add_pair(key_tile, tile, diagonal):
        for part in heads.parts(key_tile, tile, diagonal):
            for head in each:
                add_part(head, part)

    def of_keys(key_tile):
        add_pair(key_tile, key_tile, diagonal=True)

        def of_queries(tile):
            @pl.when(_meet(bound_ref, key_tile, tile))
            def _():
                add_pair(key_tile, tile, diagonal=False)

        _each(key_tile + 1, heads.tiles, of_queries)

    _each(0, heads.tiles, of_keys)

    def finish(tile):
        at = heads.span(tile)
        angle_Pq = _angle(angle_ref, at)
        dquery_Pq = rotated(heads, dquery_PL[:, at] * heads.width**-0.5, angle_Pq, -1.0)
        dquery_ref[0, at] = dquery_Pq.astype(dtype).T

        @pl.when(heads.block == heads.shared - 1)
        def _():
            # Queries were scaled for scores to base 2.
            dkey_Pk = rotated(heads, dkey_PL[:, at] * LN_2, angle_Pq, -1.0)
            dkey_ref[0, at] = dkey_Pk.astype(dtype).T
            dvalue_ref[0, at] = dvalue_PL[:, at].astype(dtype).T

    _each(0, heads.tiles, finish)


def _meet(bound_ref, key_tile, tile):
    """Whether two tiles can have a segment in common, by the ranges of their ids."""
    first, last = 0, 1
    return (bound_ref[first, key_tile] <= bound_ref[last, tile]) & (
        bound_ref[first, tile] <= bound_ref[last, key_tile]
    )


def _segments_as_columns(segment_ref, segment_LO) -> None:
    row_OL = jnp.broadcast_to(segment_ref[0], (TPU_LANES, segment_ref.shape[-1]))
    segment_LO[...] = row_OL.T


def _rotate_queries_and_keys(
    heads: Heads, at, angle_ref, segment_ref, query_ref, key_ref, query_HPL, key_HLP
) -> jax.Array:
    """Writes rotated queries and keys to scratch memory, every head by itself.

    Queries are scaled for scores to base 2.

    Returns:
      Rotated keys [P, k] of all heads.
    """
    dtype, angle_Pq = query_ref.dtype, _angle(angle_ref, at)
    query_Pq = rotated(heads, query_ref[0, at].T.astype(jnp.float32), angle_Pq)
    query_Pq = (query_Pq * (heads.width**-0.5 / LN_2)).astype(dtype)
    key_Pk = rotated(heads, key_ref[0, at].T.astype(jnp.float32), angle_Pq).astype(dtype)
    if heads.side_by_side == 1:
        query_HPL[0, :, at], key_HLP[0, at] = query_Pq, key_Pk.T
        return key_Pk
    query_code_Wq, key_code_Wk = _segment_codes(segment_ref[0, :, at], heads.width, dtype)
    for head in range(heads.side_by_side):
        _beside(heads, head, at, query_HPL, query_Pq[heads.rows(head)], query_code_Wq)
    key_HLP[0, at] = jnp.concatenate([key_Pk[heads.rows(0)], key_code_Wk], axis=0).T
    key_HLP[1, at] = jnp.concatenate([key_code_Wk, key_Pk[heads.rows(1)]], axis=0).T
    return key_Pk


def _beside(heads: Heads, head: int, at, x_HPL, x_Wq: jax.Array, others_Wq: jax.Array) -> None:
    """Writes one query head on the rows of its key/value head; something else on the others."""
    x_HPL[head, heads.key_rows(head), at] = x_Wq
    if heads.side_by_side > 1:
        x_HPL[head, heads.other_rows(head), at] = others_Wq


def _segment_codes(segment_1q: jax.Array, width: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Values of queries and keys on the 64 rows that belong to the other head.

    A row for each bit of a segment id and one for its complement: their products add nothing to
    the score of a pair of one segment, not even a rounding, and ``MASKED`` for each bit that
    differs to that of any other.
    """
    row_Wq = jax.lax.broadcasted_iota(jnp.int32, (width, segment_1q.shape[1]), 0)
    segment_Wq = jnp.broadcast_to(segment_1q, row_Wq.shape)
    bit_Wq = jax.lax.shift_right_logical(segment_Wq, jax.lax.rem(row_Wq, ID_BITS)) & 1
    key_code_Wq = jnp.where(row_Wq < ID_BITS, bit_Wq, 1 - bit_Wq).astype(jnp.float32)
    return ((1.0 - key_code_Wq) * MASKED).astype(dtype), key_code_Wq.astype(dtype)


def _angle(angle_ref, at):
    return None if angle_ref is None else angle_ref[0, at].T


def _scores(
    heads: Heads, head: int, part: Part, segment_ref, segment_LO, query_HPL, key_HLP
) -> jax.Array:
    query_Pq = query_HPL[head, :, part.queries]
    score_kq = _product(key_HLP[heads.key_head(head), part.keys], query_Pq)
    if heads.side_by_side == 1:
        attends_kq = segment_LO[part.keys, :1] == segment_ref[0, :, part.queries]
        score_kq = jnp.where(attends_kq, score_kq, MASKED)
    if part.later is not None:
        key_kq = jax.lax.broadcasted_iota(jnp.int32, score_kq.shape, 0)
        query_kq = jax.lax.broadcasted_iota(jnp.int32, score_kq.shape, 1) + part.later
        score_kq = jnp.where(key_kq <= query_kq, score_kq, MASKED)
    return score_kq


def _product(left, right, transposed: bool = False) -> jax.Array:
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)


def _each(first, end, body: Callable) -> None:
    def one(index, nothing):
        body(index)
        return nothing

    jax.lax.fori_loop(first, end, one, None)
