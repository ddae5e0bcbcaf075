"""Tile sizes of the fused SwiGLU kernels, by the same arithmetic as :mod:`.tiling`.

Axis legend: R rows, E experts, D model width, F hidden width of an expert, and the tile sizes m
along rows and f along F.
"""

import dataclasses
import functools
from itertools import product

from dynmoe_jax.experts.kernels.tpu.tiling import ROW_TILES, roofline, row_tile, uneven
from dynmoe_jax.hardware.target import TPU_LANES
from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import kernel_limit, tile_budget


@dataclasses.dataclass(frozen=True)
class Tile:
    """Tile of m rows and f hidden columns; the model width is never cut."""

    m: int
    f: int


@dataclasses.dataclass(frozen=True)
class SwiGLUTiling:
    """Tiles of both kernels, and how many bytes of VMEM they may take."""

    forward: Tile
    backward: Tile
    vmem_bytes: int


@functools.cache
def swiglu_tiling(
    rows: int,
    experts: int,
    width: int,
    hidden_width: int,
    itemsize: int,
    flops_per_byte: float,
    vmem_bytes: int,
) -> SwiGLUTiling | None:
    """Chooses the tiles of least time, of FLOPs or of traffic; None where no tile fits.

    None fits where D or F are no multiples of 128, or are so large that a tile of whole rows does
    not fit into VMEM.

    Args:
      rows: R.
      experts: E.
      width: D.
      hidden_width: F.
      itemsize: bytes of one number.
      flops_per_byte: the chip's peak rate over its memory's.
      vmem_bytes: VMEM of a core.
    """
    if width % TPU_LANES or hidden_width % TPU_LANES:
        return None
    row_tiles = ROW_TILES[ROW_TILES.index(row_tile(rows, experts)) :]
    columns = [f for f in range(TPU_LANES, hidden_width + 1, TPU_LANES) if hidden_width % f == 0]

    def best(products: int, sides: int, results: int) -> Tile | None:
        def vmem(m, f):
            read = sides * m * width + products * width * f
            # Reading and writing overlap with products: two of each.  Sums and what is between
            # them in float32: about as many tiles as products, and three.
            return 2 * itemsize * (read + results * m * f) + 4 * (products + 3) * m * f

        def cost(m, f):
            tiles = hidden_width // f
            flops = 2 * products * rows * width * hidden_width * uneven(tiles)
            moved = tiles * sides * rows * width + results * rows * hidden_width
            moved += products * experts * width * hidden_width
            # The row tile of the other products, if it fits: which tiles are visited is then known.
            # Where two tie, the fewest visits: each costs a fixed time besides its products.
            return -m, roofline(flops, itemsize * moved, flops_per_byte), -f

        tiles = product(row_tiles, columns)
        tile = cheapest_tile(tiles, vmem, tile_budget(vmem_bytes), cost)
        return Tile(*tile) if tile else None

    # Gate and up of x to hidden; with dy and down^T to hidden and both their gradients.
    forward, backward = best(2, 1, 1), best(3, 2, 3)
    if forward is None or backward is None:
        return None
    return SwiGLUTiling(forward, backward, kernel_limit(vmem_bytes))
