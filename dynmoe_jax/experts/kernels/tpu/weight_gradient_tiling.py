"""Tile sizes of the weight gradient's kernel, by the same arithmetic as :mod:`.tiling`.

Axis legend: R rows, E experts, I and O the inner and outer width of a matrix, and the tile sizes m
along rows, k along I and n along O.
"""

import dataclasses
import functools
import math
from itertools import product

from dynmoe_jax.experts.kernels.tpu.tiling import (
    ROW_TILES,
    padded,
    roofline,
    row_tile,
    uneven,
    widths,
)
from dynmoe_jax.hardware.target import TPU_LANES
from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import kernel_limit, tile_budget

BLOCK_ROWS = 256
"""Most rows of a block of a shared tile: what a matrix unit of v6e contracts at once."""

UNIT = 256
"""Most columns of a matrix unit: a tile that is no multiple leaves some of it idle."""


@dataclasses.dataclass(frozen=True)
class GradientTiling:
    """Tile, rows of a block, and how many bytes of VMEM the kernel may take."""

    m: int
    k: int
    n: int
    block: int
    vmem_bytes: int


def block_rows(rows: int, experts: int) -> int:
    """Rows of a tile that are computed together, and a second time where two experts share them."""
    return min(row_tile(rows, experts), BLOCK_ROWS)


@functools.cache
def weight_gradient_tiling(
    rows: int,
    experts: int,
    inner: int,
    outer: int,
    itemsize: int,
    flops_per_byte: float,
    vmem_bytes: int,
) -> GradientTiling | None:
    """Chooses the tile of least time, of FLOPs or of traffic; None where no tile fits.

    None fits where I or O are no multiples of 128.

    Args:
      rows: R.
      experts: E.
      inner: I.
      outer: O.
      itemsize: bytes of one number.
      flops_per_byte: the chip's peak rate over its memory's.
      vmem_bytes: VMEM of a core.
    """
    if inner % TPU_LANES or outer % TPU_LANES:
        return None
    block = block_rows(rows, experts)

    def vmem(m, k, n):
        # Reading and writing overlap with products: two of each.  Sides are held once more, one of
        # them transposed; sums in float32.
        return itemsize * (3 * m * (k + n) + 2 * k * n) + 4 * k * n

    def cost(m, k, n):
        across, down = math.ceil(outer / n), math.ceil(inner / k)
        area = padded(inner, k) * across * padded(n, UNIT)
        flops = 2 * (rows + (experts - 1) * block) * area * uneven(across * down)
        moved = rows * (inner * across + outer * down) + experts * inner * outer
        # Where two tie, the fewest steps: each costs a fixed time besides its product.
        return roofline(flops, itemsize * moved, flops_per_byte), -m * k * n

    row_tiles = [m for m in ROW_TILES if m >= block and rows % m == 0]
    tiles = product(row_tiles, widths(inner), widths(outer))
    tile = cheapest_tile(tiles, vmem, tile_budget(vmem_bytes), cost)
    return GradientTiling(*tile, block, kernel_limit(vmem_bytes)) if tile else None
