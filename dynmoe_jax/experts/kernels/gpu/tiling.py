"""Tiles of the kernels for GPU (:mod:`.gmm`), from shapes alone.

Axis legend: R rows, E experts, V visits of row tiles, and the tile sizes m along rows, c along the
columns of the result and k along what is summed over.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Int

ROW_TILES = (128, 64, 32, 16)
TILES_OF_EXPERT = 4
"""Least number of row tiles of an expert on average: its last one is half empty."""

STAGES = 3

COLUMN_TILES = (256, 128, 64)
WIDTH_MULTIPLE = 128
"""Divisor that both widths must have: the kernels look at no column twice."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile sizes, warps and pipeline stages of one program.

    Attributes:
      m: rows.
      c: columns of the result.
      k: summed over at a time.
      warps: of 32 threads each.
      stages: pieces of both sides in flight at a time.
    """

    m: int
    c: int
    k: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of the four kernels of a layer.

    Attributes:
      product: of rows with matrices.
      gradient: of the weights; m and c cut a matrix, k counts rows.
      swiglu: of gate and up, c / 2 columns of each.
      dswiglu: of the gradient of what is hidden.
    """

    product: Tile
    gradient: Tile
    swiglu: Tile
    dswiglu: Tile


@functools.cache
def tiles_for(rows: int, experts: int, shared_bytes: int) -> Tiles:
    """Chooses tiles for R rows of E experts.

    128 x 256 sums fill half of the registers of an SM, so there is one program on each.  Pieces of
    64 of both sides lie three times over in shared memory (docs/measurements.md:
    gpu-shared-memory); where that does not fit, pieces of 32.  Row tiles are smaller where experts
    have few rows.

    Args:
      rows: R.
      experts: E.
      shared_bytes: shared memory that a program may have.
    """
    mean = rows / experts
    m = next((m for m in ROW_TILES if m * TILES_OF_EXPERT <= mean), ROW_TILES[-1])
    wide = _tile(m, 256 if m == ROW_TILES[0] else 128, shared_bytes)
    # Sums are not all that the last one holds: gate, up and their gradients are as large as they.
    return Tiles(wide, _tile(128, 256, shared_bytes), wide, _tile(m, 128, shared_bytes))


def _tile(m: int, c: int, shared_bytes: int) -> Tile:
    bytes_of_stage = 2 * 64 * (m + c)
    k = 64 if STAGES * bytes_of_stage <= shared_bytes else 32
    return Tile(m, c, k, 8 if m == ROW_TILES[0] else 4, STAGES)


def dividing(tile: int, width: int) -> int:
    """Largest tile, no larger than this one, that divides a multiple of 128."""
    return next(c for c in COLUMN_TILES if c <= tile and width % c == 0)


Visits = tuple[Int[Array, "V"], Int[Array, "V"], Int[Array, "V"]]


def visits_of(group_size_E: Int[Array, "E"], rows: int, m: int) -> Visits:
    """Expert, first row and end of the expert's rows of every row tile.

    Row tiles begin with the rows of an expert, so none is shared.  V is the most that there may
    be; those that do not exist begin where their expert ends.
    """
    experts = group_size_E.shape[0]
    end_E = jnp.cumsum(group_size_E)
    tiles_E = -(-group_size_E // m)
    last_E = jnp.cumsum(tiles_E)
    v_V = jnp.arange(rows // m + experts)
    expert_V = jnp.sum(v_V[:, None] >= last_E, axis=-1)
    expert_V = jnp.minimum(expert_V, experts - 1)
    before_V = v_V - (last_E - tiles_E)[expert_V]
    end_V = end_E[expert_V]
    first_V = jnp.minimum((end_E - group_size_E)[expert_V] + before_V * m, end_V)
    return tuple(x_V.astype(jnp.int32) for x_V in (expert_V, first_V, end_V))
