"""The bodies of :mod:`.flat_attention`: what one TPU core does for the heads of one block of lanes.

A block holds whole sequences of P lanes: one head, or P/W narrow ones side by side.  Everything is
in fast memory, so a program reads and writes each array once.  Tiles of scores stand as [keys,
queries]: what belongs to a query (maximum, sum, delta) is then one row, and rows cost the vector
units an eighth of columns.  A tile above the diagonal is never computed, nor one whose queries and
keys have no segment in common.

Two narrow heads share lanes without being cut apart: the queries of one head keep their lanes and
have zeros in all others, so a product over all P lanes is the product of that head.

Axis legend: L positions, P lanes of a block, W head width, q and k the queries and keys of one
tile.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dynmoe_jax.target import TPU_LANES

MASKED = -1e30
"""Score of a pair that does not attend; finite, so that no difference is NaN."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """How heads lie in blocks.

    Attributes:
      width: W.
      lanes: P.
      length: L.
      shared: query heads of one key/value head.
      tile: positions of a tile; divides L.
      block: which block of query heads this program has, among those that share its block of
        key/value heads; known within a kernel alone.
    """

    width: int
    lanes: int
    length: int
    shared: int
    tile: int
    block: int | jax.Array = 0

    @property
    def side_by_side(self) -> int:
        """Heads in one block of lanes."""
        return self.lanes // self.width

    @property
    def tiles(self) -> int:
        """Tiles of one sequence."""
        return self.length // self.tile

    @property
    def pairs(self) -> int:
        """(query, key) pairs that are computed for one head of one sequence."""
        return self.tiles * (self.tiles + 1) // 2 * self.tile**2

    def span(self, tile) -> pl.Slice:
        """The positions of a tile."""
        return pl.ds(pl.multiple_of(tile * self.tile, self.tile), self.tile)

    def key_head(self, head: int):
        """Which key/value head of its block a query head of this program's block uses."""
        if self.shared == 1:
            return head
        return jax.lax.div(self.block * self.side_by_side + head, self.shared)

    def key_rows(self, head: int) -> pl.Slice:
        """Its rows in transposed keys or values."""
        return pl.ds(pl.multiple_of(self.key_head(head) * self.width, self.width), self.width)

    def alone(self, x_qP: jax.Array, head: int) -> jax.Array:
        """One head, on the lanes of its key/value head; zeros elsewhere."""
        if self.side_by_side == 1:
            return x_qP
        lane_qP = jax.lax.broadcasted_iota(jnp.int32, x_qP.shape, 1)
        x_qP = jnp.where(jax.lax.div(lane_qP, self.width) == head, x_qP, 0.0)
        if self.shared == 1:
            return x_qP
        moved = jax.lax.rem(self.key_head(head) - head + self.side_by_side, self.side_by_side)
        return pltpu.roll(x_qP, moved * self.width, 1)


def turned(heads: Heads, x_qP: jax.Array, angle_qP: jax.Array | None, sign: float = 1.0):
    """Rotary positions of float32 queries or keys; ``sign=-1`` turns back.

    Args:
      heads: how they lie.
      x_qP: queries or keys.
      angle_qP: cosines in the first half of the lanes, sines in the second; None: nothing to turn.
      sign: of the angles.
    """
    if angle_qP is None:
        return x_qP
    half = heads.width // 2
    lane_qP = jax.lax.broadcasted_iota(jnp.int32, x_qP.shape, 1)
    swapped_qP = pltpu.roll(angle_qP, heads.lanes // 2, 1)
    left_qP = lane_qP < heads.lanes // 2
    cos_qP = jnp.where(left_qP, angle_qP, swapped_qP)
    sin_qP = sign * jnp.where(left_qP, swapped_qP, angle_qP)
    first_qP = jax.lax.rem(lane_qP, heads.width) < half
    partner_qP = pltpu.roll(x_qP, heads.lanes - half, 1)
    if heads.side_by_side > 1:
        partner_qP = jnp.where(first_qP, partner_qP, pltpu.roll(x_qP, half, 1))
    return x_qP * cos_qP + partner_qP * jnp.where(first_qP, -sin_qP, sin_qP)


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
    query_HLP,
    key_LP,
    value_PL,
):
    """Mixed values, and the log-sum-exp of each query's scores."""
    heads, dtype = dataclasses.replace(heads, block=pl.program_id(2)), query_ref.dtype
    bound_ref = bound_ref.at[:, pl.program_id(0)]
    _segments_as_columns(segment_ref, segment_LO)

    def prepare(tile):
        at = heads.span(tile)
        _turn_queries_and_keys(heads, at, angle_ref, query_ref, key_ref, query_HLP, key_LP)
        value_PL[:, at] = value_ref[0, at].astype(jnp.float32).T.astype(dtype)

    _each(0, heads.tiles, prepare)

    def mix(tile):
        at, mixed = heads.span(tile), []
        for head in range(heads.side_by_side):
            rows = heads.key_rows(head)

            def scores_kq(key_tile, diagonal, head=head):
                return _scores(
                    heads,
                    key_tile,
                    tile,
                    diagonal,
                    segment_ref,
                    segment_LO,
                    query_HLP.at[head],
                    key_LP,
                )

            def values_Wq(odds_kq, key_tile, rows=rows):
                return _product(value_PL[rows, heads.span(key_tile)], odds_kq.astype(dtype))

            score_kq = scores_kq(tile, diagonal=True)
            most_1q = jnp.max(score_kq, axis=0, keepdims=True)
            odds_kq = jnp.exp(score_kq - most_1q)
            state = most_1q, jnp.sum(odds_kq, axis=0, keepdims=True), values_Wq(odds_kq, tile)

            def add(key_tile, state, scores_kq=scores_kq, values_Wq=values_Wq):
                most_1q, sum_1q, mixed_Wq = state
                score_kq = scores_kq(key_tile, diagonal=False)
                more_1q = jnp.maximum(most_1q, jnp.max(score_kq, axis=0, keepdims=True))
                odds_kq, shrink_1q = jnp.exp(score_kq - more_1q), jnp.exp(most_1q - more_1q)
                sum_1q = sum_1q * shrink_1q + jnp.sum(odds_kq, axis=0, keepdims=True)
                return more_1q, sum_1q, mixed_Wq * shrink_1q + values_Wq(odds_kq, key_tile)

            def add_if_met(key_tile, state, add=add):
                meet = _meet(bound_ref, key_tile, tile)
                return jax.lax.cond(meet, partial(add, key_tile), lambda state: state, state)

            most_1q, sum_1q, mixed_Wq = jax.lax.fori_loop(0, tile, add_if_met, state)
            mixed.append(mixed_Wq / sum_1q)
            log_sum_ref[0, 0, head : head + 1, at] = most_1q + jnp.log(sum_1q)
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
    query_HLP,
    key_LP,
    key_PL,
    dmixed_HLP,
    delta_HL,
    dquery_PL,
    dkey_LP,
    dvalue_LP,
):
    """Gradients, from probabilities that are computed again: five products for each tile."""
    heads, dtype = dataclasses.replace(heads, block=pl.program_id(2)), query_ref.dtype
    bound_ref = bound_ref.at[:, pl.program_id(0)]
    _segments_as_columns(segment_ref, segment_LO)
    dquery_PL[...] = jnp.zeros_like(dquery_PL)

    @pl.when(heads.block == 0)
    def _():
        dkey_LP[...] = jnp.zeros_like(dkey_LP)
        dvalue_LP[...] = jnp.zeros_like(dvalue_LP)

    def prepare(tile):
        at = heads.span(tile)
        _turn_queries_and_keys(heads, at, angle_ref, query_ref, key_ref, query_HLP, key_LP)
        key_PL[:, at] = key_LP[at].astype(jnp.float32).T.astype(dtype)
        dmixed_qP = dmixed_ref[0, at].astype(jnp.float32)
        # <dprobs, probs> of a query is <dmixed, mixed>.
        delta_Pq = (dmixed_qP * mixed_ref[0, at].astype(jnp.float32)).T
        for head in range(heads.side_by_side):
            dmixed_HLP[head, at] = heads.alone(dmixed_qP, head).astype(dtype)
            of_head_Wq = delta_Pq[head * heads.width : (head + 1) * heads.width]
            delta_HL[head : head + 1, at] = jnp.sum(of_head_Wq, axis=0, keepdims=True)

    _each(0, heads.tiles, prepare)

    def add_pair(head, key_tile, tile, diagonal):
        at, keys = heads.span(tile), heads.span(key_tile)
        score_kq = _scores(
            heads, key_tile, tile, diagonal, segment_ref, segment_LO, query_HLP.at[head], key_LP
        )
        probs_kq = jnp.exp(score_kq - log_sum_ref[0, 0, head : head + 1, at])
        dmixed_qP = dmixed_HLP[head, at]
        dprobs_kq = _product(value_ref[0, keys], dmixed_qP, transposed=True)
        dscore_kq = (probs_kq * (dprobs_kq - delta_HL[head : head + 1, at])).astype(dtype)
        dvalue_LP[keys] += _product(probs_kq.astype(dtype), dmixed_qP)
        dkey_LP[keys] += _product(dscore_kq, query_HLP[head, at])
        rows = slice(head * heads.width, (head + 1) * heads.width)
        dquery_PL[rows, at] += _product(key_PL[heads.key_rows(head), keys], dscore_kq)

    for head in range(heads.side_by_side):

        def of_keys(key_tile, head=head):
            add_pair(head, key_tile, key_tile, diagonal=True)

            def of_queries(tile):
                @pl.when(_meet(bound_ref, key_tile, tile))
                def _():
                    add_pair(head, key_tile, tile, diagonal=False)

            _each(key_tile + 1, heads.tiles, of_queries)

        _each(0, heads.tiles, of_keys)

    def finish(tile):
        at = heads.span(tile)
        dquery_qP = dquery_PL[:, at].T * heads.width**-0.5
        dquery_ref[0, at] = turned(heads, dquery_qP, _angle(angle_ref, at), -1.0).astype(dtype)

        @pl.when(heads.block == heads.shared - 1)
        def _():
            dkey_kP = turned(heads, dkey_LP[at], _angle(angle_ref, at), -1.0)
            dkey_ref[0, at] = dkey_kP.astype(dtype)
            dvalue_ref[0, at] = dvalue_LP[at].astype(dtype)

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


def _turn_queries_and_keys(heads, at, angle_ref, query_ref, key_ref, query_HLP, key_LP) -> None:
    """Into scratch memory: turned, scaled, and every query head by itself."""
    dtype, angle_qP = query_ref.dtype, _angle(angle_ref, at)
    query_qP = turned(heads, query_ref[0, at].astype(jnp.float32), angle_qP) * heads.width**-0.5
    for head in range(heads.side_by_side):
        query_HLP[head, at] = heads.alone(query_qP, head).astype(dtype)
    key_LP[at] = turned(heads, key_ref[0, at].astype(jnp.float32), angle_qP).astype(dtype)


def _angle(angle_ref, at):
    return None if angle_ref is None else angle_ref[0, at]


def _scores(heads, key_tile, tile, diagonal: bool, segment_ref, segment_LO, query_LP, key_LP):
    at, keys = heads.span(tile), heads.span(key_tile)
    score_kq = _product(key_LP[keys], query_LP[at], transposed=True)
    attends_kq = segment_LO[keys, :1] == segment_ref[0, :, at]
    if diagonal:
        key_kq = jax.lax.broadcasted_iota(jnp.int32, score_kq.shape, 0)
        attends_kq &= key_kq <= jax.lax.broadcasted_iota(jnp.int32, score_kq.shape, 1)
    return jnp.where(attends_kq, score_kq, MASKED)


def _product(left, right, transposed: bool = False) -> jax.Array:
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, preferred_element_type=jnp.float32)


def _each(first, end, body: Callable) -> None:
    def one(index, nothing):
        body(index)
        return nothing

    jax.lax.fori_loop(first, end, one, None)
