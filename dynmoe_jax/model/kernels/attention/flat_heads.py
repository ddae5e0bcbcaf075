"""Layout of heads side by side in the blocks and tiles of :mod:`.flat`.

Axis legend: L positions, P lanes of a block, W head width.
"""

import dataclasses

import jax
from jax.experimental import pallas as pl

from dynmoe_jax.hardware.target import TPU_LANES


@dataclasses.dataclass(frozen=True)
class Heads:
    """Layout of heads in blocks.

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
        below = self.tiles * (self.tiles - 1) // 2 * self.tile**2
        on_diagonal = sum(p.keys.size * p.queries.size for p in self.parts(0, 0, diagonal=True))
        return below + self.tiles * on_diagonal

    def span(self, tile) -> pl.Slice:
        """Positions of a tile."""
        return pl.ds(pl.multiple_of(tile * self.tile, self.tile), self.tile)

    def parts(self, key_tile, tile, diagonal: bool) -> list["Part"]:
        """Parts of two tiles to compute: all, or on the diagonal three quarters if these fit."""
        if not diagonal:
            return [Part(self.span(key_tile), self.span(tile), slice(None), None)]
        half = self.tile // 2
        if half % TPU_LANES:
            return [Part(self.span(key_tile), self.span(tile), slice(None), 0)]
        start, middle = (pl.multiple_of(tile * self.tile + first, half) for first in (0, half))
        return [
            Part(pl.ds(start, half), pl.ds(start, half), slice(0, half), 0),
            Part(pl.ds(start, self.tile), pl.ds(middle, half), slice(half, None), half),
        ]

    def key_head(self, head: int):
        """Number in its block of the key/value head that a query head of this program uses."""
        if self.shared == 1:
            return head
        return jax.lax.div(self.block * self.side_by_side + head, self.shared)

    def rows(self, head: int) -> slice:
        """Rows of a query head in transposed queries."""
        return slice(head * self.width, (head + 1) * self.width)

    def key_rows(self, head: int) -> pl.Slice:
        """Rows of its key/value head in transposed keys or values."""
        return pl.ds(pl.multiple_of(self.key_head(head) * self.width, self.width), self.width)

    def other_rows(self, head: int) -> pl.Slice:
        """Rows of the other of two key/value heads."""
        other = 1 - self.key_head(head)
        return pl.ds(pl.multiple_of(other * self.width, self.width), self.width)


@dataclasses.dataclass(frozen=True)
class Part:
    """Pairs of positions that are computed together.

    Attributes:
      keys: which.
      queries: which.
      columns: of the tile of queries.
      later: positions from the first key to the first query; None: all keys are before all queries.
    """

    keys: pl.Slice
    queries: pl.Slice
    columns: slice
    later: int | None
