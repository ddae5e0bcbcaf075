"""The weight gradient's kernel, in interpret mode, against a plain formula; its tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts.kernels.tpu.weight_gradient import weight_gradient
from dynmoe_jax.experts.kernels.tpu.weight_gradient_tiling import (
    GradientTiling,
    weight_gradient_tiling,
)
from dynmoe_jax.hardware.chips import CHIPS
from dynmoe_jax.hardware.vmem import tile_budget

R, E, INNER, OUTER = 512, 5, 256, 384
GROUPS = {
    # Blocks of 128 rows: shared by two and by three experts, an expert without rows in the middle
    # of a tile, a last tile that is not full.
    "uneven": [100, 0, 5, 300, 30],
    "all_rows": [129, 127, 128, 1, 127],
    "whole_tiles": [0, 256, 0, 256, 0],
    "one_takes_all": [0, 0, 512, 0, 0],
    "one_row": [0, 0, 0, 1, 0],
    "two_in_a_block": [130, 3, 7, 0, 0],
    "no_rows": [0, 0, 0, 0, 0],
}
TILINGS = {
    "one_block": GradientTiling(128, 128, 384, 128, 2**26),
    "two_blocks": GradientTiling(256, 256, 128, 128, 2**26),
    "cut_unevenly": GradientTiling(512, 256, 256, 128, 2**26),
}


def draw(used, dtype=jnp.float32):
    """Rows beyond those used are NaN: what a kernel does not mask spoils its sums."""
    keys = jax.random.split(jax.random.key(0), 2)
    row_R1 = jnp.arange(R)[:, None]
    return [
        jnp.where(row_R1 < used, jax.random.normal(key, (R, width)), jnp.nan).astype(dtype)
        for key, width in zip(keys, (INNER, OUTER), strict=True)
    ]


def plain(x_RI, dy_RO, group_size_E):
    """One expert after another, in float64."""
    ends = np.cumsum(group_size_E)
    x_RI, dy_RO = (np.asarray(rows.astype(jnp.float32), np.float64) for rows in (x_RI, dy_RO))
    spans = [slice(end - size, end) for end, size in zip(ends, group_size_E, strict=True)]
    return np.stack([x_RI[rows].T @ dy_RO[rows] for rows in spans])


@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize(
    "tiling",
    [
        name if name == "one_block" else pytest.param(name, marks=pytest.mark.long)
        for name in TILINGS
    ],
)
def test_the_kernel_equals_the_formula(tiling, groups):
    sides = draw(sum(GROUPS[groups]))
    group_size_E = jnp.array(GROUPS[groups], jnp.int32)
    actual = weight_gradient(TILINGS[tiling], *sides, group_size_E, interpret=True)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, plain(*sides, GROUPS[groups]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("groups", ["uneven", "one_takes_all"])
def test_sums_of_bfloat16_run_in_float32(groups):
    sides = draw(sum(GROUPS[groups]), jnp.bfloat16)
    group_size_E = jnp.array(GROUPS[groups], jnp.int32)
    actual = weight_gradient(TILINGS["one_block"], *sides, group_size_E, interpret=True)
    assert actual.dtype == jnp.bfloat16
    wanted = plain(*sides, GROUPS[groups])
    # One rounding to eight bits: four sums of a tile rounded in between would be off by more.
    error = np.abs(np.asarray(actual, np.float64) - wanted)
    assert np.all(error <= 2**-8 * np.abs(wanted) + 1e-3)


def test_tiles_by_hand():
    # 5632 = 2 x 2816 columns: 64 MiB of v5p hold the sums of half of them, 4 x 1024 x 2816 = 11.5
    # million bytes, what is written, as much, and 512 rows three times, 3 x 2 x 512 x 3840.  A core
    # takes one half.  Of 65536 rows, blocks of 256 that 16 experts share are a sixteenth.
    tiling = weight_gradient_tiling(65536, 16, 1024, 5632, 2, 166.0, 64 * 2**20)
    assert (tiling.m, tiling.k, tiling.n, tiling.block) == (512, 1024, 2816, 256)
    # Of fewer rows, blocks are smaller, and tiles are not.
    fewer = weight_gradient_tiling(16384, 16, 1024, 5632, 2, 166.0, 64 * 2**20)
    assert (fewer.m, fewer.block) == (512, 128)
    # I = 704 is no multiple of 128.
    assert weight_gradient_tiling(65536, 16, 704, 1024, 2, 166.0, 64 * 2**20) is None


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize("shape", [(1024, 5632), (14336, 4096), (1024, 2048), (128, 128)])
def test_tiles_fit(chip, shape):
    chip = CHIPS[chip]
    balance = chip.flops_per_s / chip.bytes_per_s
    tiling = weight_gradient_tiling(65536, 16, *shape, 2, balance, chip.vmem_bytes)
    for tile, width in zip((tiling.k, tiling.n), shape, strict=True):
        assert tile <= width
        assert tile % 128 == 0
    assert 65536 % tiling.m == tiling.m % tiling.block == 0
    m, k, n = tiling.m, tiling.k, tiling.n
    # Sums, and two of each side and of the result.
    held = 4 * k * n + 2 * 2 * (m * k + m * n + k * n)
    assert held <= tile_budget(chip.vmem_bytes) < tiling.vmem_bytes
