"""Tile sizes of grouped matmuls on TPU, from shapes and the chip's balance alone.

No TPU was at hand to measure on, and the compiler's estimate of a kernel's cycles is "unknown".  So
the sizes follow from arithmetic: of the tiles that fit, those with the least time on a roofline.

Axis legend: R rows, E experts, I inner (contracted) and O outer width of a product, and the tile
sizes m, k, n along rows, inner and outer width.
"""

import functools
import math
from collections.abc import Callable
from itertools import product

from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import MEGABLOX_BUDGET

Tiling = tuple[int, int, int]

CORES = 2
"""Most TensorCores per chip (v4, v5p: 2); they split the grid of a kernel."""

ROW_TILES = (512, 256, 128)
ROW_MULTIPLE = ROW_TILES[0]
"""Divisor that R must have, so that every row tile divides it."""

BOUNDARY_SHARE = 16
"""Largest share of R that shared tiles may add, as R / 16.  A row tile that two experts share is
computed twice; tiles are so small that this adds no more, or as small as they get."""


def row_tile(rows: int, experts: int) -> int:
    """Row tile m of all products of a layer: XLA then works out once which tiles they visit."""
    fits = [m for m in ROW_TILES if (experts - 1) * m * BOUNDARY_SHARE <= rows]
    return fits[0] if fits else ROW_TILES[-1]


@functools.cache
def product_tiling(
    rows: int,
    experts: int,
    inner: int,
    outer: int,
    itemsize: int,
    flops_per_byte: float,
    transposed: bool = False,
) -> Tiling:
    """Tile (m, k, n) of the grouped matmul [R, I] x [E, I, O] -> [R, O].

    While the inner width fits into one tile, a tile of the matrix is read once per expert, and the
    rows once per tile of the outer width; else both are read for every tile of the result.

    Args:
      rows: R.
      experts: E.
      inner: I.
      outer: O.
      itemsize: bytes of one number.
      flops_per_byte: the chip's peak rate over its memory's.
      transposed: the matrices are stored as [E, O, I]; if they are cut along I, the kernel
        transposes a copy of a tile, which takes VMEM too (docs/measurements.md:
        v5p-transposed-copy).
    """

    def traffic(m, k, n):
        times_read = experts if k >= inner else rows / m + experts - 1
        sides = rows * inner * math.ceil(outer / n) + times_read * inner * outer
        return sides + rows * outer

    def vmem(m, k, n):
        copied = itemsize * k * n if transposed and k < inner else 0
        return 2 * itemsize * (m * k + k * n + m * n) + 4 * m * n + copied

    return _fastest(rows, experts, inner, outer, itemsize, flops_per_byte, traffic, vmem)


@functools.cache
def gradient_tiling(
    rows: int, experts: int, inner: int, outer: int, itemsize: int, flops_per_byte: float
) -> Tiling:
    """Tile (m, k, n) of the weight gradient [R, I]^T x [R, O] -> [E, I, O]; arguments as above.

    Each side is read once per tile of the other.  The kernel masks rows in float32 copies.
    """

    def traffic(m, k, n):
        sides = rows * (inner * math.ceil(outer / n) + outer * math.ceil(inner / k))
        return sides + experts * inner * outer

    def vmem(m, k, n):
        return (2 * itemsize + 4) * (m * k + m * n + k * n)

    return _fastest(rows, experts, inner, outer, itemsize, flops_per_byte, traffic, vmem)


def _fastest(
    rows: int,
    experts: int,
    inner: int,
    outer: int,
    itemsize: int,
    flops_per_byte: float,
    traffic: Callable[[int, int, int], float],
    vmem: Callable[[int, int, int], float],
) -> Tiling:
    """Chooses the tile of least time: of FLOPs or of traffic, whichever takes longer."""

    def cost(m, k, n):
        # A ragged tile is computed in full.
        flops = 2 * (rows + (experts - 1) * m) * padded(inner, k) * padded(outer, n)
        # Where two tie, the fewest steps: each costs a fixed time besides its product.
        return roofline(flops, itemsize * traffic(m, k, n), flops_per_byte), -m * k * n

    tiles = product([row_tile(rows, experts)], widths(inner), widths(outer))
    return cheapest_tile(tiles, vmem, MEGABLOX_BUDGET, cost)


def roofline(flops: float, bytes_moved: float, flops_per_byte: float) -> float:
    """Time of FLOPs or of traffic, whichever is longer, in bytes that memory moves in it."""
    return max(flops / flops_per_byte, bytes_moved)


def uneven(tiles: int) -> float:
    """Factor by which ``tiles`` take longer because a core with one less waits for the other."""
    return math.ceil(tiles / CORES) * CORES / tiles


def padded(width: int, tile: int) -> int:
    """Rounds a width up to whole tiles."""
    return math.ceil(width / tile) * tile


def widths(width: int) -> list[int]:
    """Lists tiles of a width: all of it, or multiples of 128 that cut it into 2, 3, ... parts."""
    parts = range(2, math.ceil(width / 128) + 1)
    return [width, *dict.fromkeys(math.ceil(width / p / 128) * 128 for p in parts)]
