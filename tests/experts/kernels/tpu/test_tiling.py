"""Tiles for TPU kernels: what they must satisfy, and one choice worked out by hand."""

import math

import pytest

from dynmoe_jax.experts.kernels.tpu.tiling import (
    ROW_MULTIPLE,
    ROW_TILES,
    gradient_tiling,
    product_tiling,
    row_tile,
)
from dynmoe_jax.hardware.vmem import MEGABLOX_BUDGET

V5P, V6E = 166.0, 560.0
SHAPES = [
    (16384, 16, 1024, 5632),
    (16384, 16, 5632, 1024),
    (65536, 8, 4096, 28672),
    (32768, 64, 1024, 512),
    (512, 16, 192, 640),
    (512, 4, 200, 40),
]


@pytest.mark.parametrize("chip", [V5P, V6E])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiling", [product_tiling, gradient_tiling])
def test_tiles_fit(tiling, shape, chip):
    _, _, inner, outer = shape
    m, k, n = tiling(*shape, 2, chip)
    assert m in ROW_TILES
    assert ROW_MULTIPLE % m == 0
    for tile, width in ((k, inner), (n, outer)):
        assert tile == width or tile % 128 == 0
        assert tile <= math.ceil(width / 128) * 128
    # Two copies of each side, so that the next tile loads while this one is computed.
    assert 2 * 2 * (m * k + k * n + m * n) <= MEGABLOX_BUDGET or tiling is gradient_tiling


def test_row_tiles_by_hand():
    # 15 boundaries of 16 experts: 15 * 128 * 16 = 30720 rows at the least for tiles of 128 to cost
    # a sixteenth, 61440 for 256, 122880 for 512.
    assert row_tile(122880, 16) == 512
    assert row_tile(122879, 16) == 256
    assert row_tile(61439, 16) == 128
    assert row_tile(512, 64) == 128
    assert row_tile(512, 1) == 512


def test_a_tile_of_the_paper_by_hand():
    # [16384, 1024] x [16, 1024, 5632] on v5p.  All of k = 1024 fits, so a tile of a matrix is read
    # once per expert.  Products take
    #   2 * (16384 + 15 * 128) * 1024 * 5632 / 166 = 1.27e9 byte times,
    # traffic 2 * (16384 * 1024 * 4 + 16 * 1024 * 5632 + 16384 * 5632) = 0.50e9 bytes: compute
    # bound, like every n from 256 to 1408 that divides 5632 (and 5632 = 4 * 1408 has the fewest
    # steps; 1920 * 3 = 5760 pads).
    assert product_tiling(16384, 16, 1024, 5632, 2, V5P) == (128, 1024, 1408)


def test_a_chip_of_slower_memory_gets_wider_tiles():
    # v6e computes faster than it reads the rows once per tile of the outer width: three, not four.
    v5p, v6e = (product_tiling(16384, 16, 1024, 5632, 2, chip) for chip in (V5P, V6E))
    assert v6e[2] > v5p[2]


def test_transposed_matrices_leave_room_for_a_copy_of_a_tile():
    # The input gradient of gate and up: 5632 contracted.  The compiler for v5p counted 16.08 MiB
    # for tiles of 512 x 2816 x 512, of the 16 that a kernel has.
    shape = 131072, 16, 5632, 1024, 2, 459 / 2.77
    plain, transposed = (product_tiling(*shape, transposed=t) for t in (False, True))
    assert plain == (512, 2816, 512)
    m, k, n = transposed
    assert k < 5632
    assert 4 * (m * k + k * n + m * n) + 4 * m * n + 2 * k * n <= MEGABLOX_BUDGET
