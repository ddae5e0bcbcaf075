"""The fused SwiGLU kernels, in interpret mode, against the passes they replace; their tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts.kernels.contract import REFERENCE
from dynmoe_jax.experts.kernels.swiglu import plain_swiglu
from dynmoe_jax.experts.kernels.tpu.swiglu import fused_swiglu
from dynmoe_jax.experts.kernels.tpu.swiglu_tiling import SwiGLUTiling, Tile, swiglu_tiling
from tests.experts.kernels.grouped_case import draw

GROUPS = {
    # Tiles of 128 rows: shared by two and by three experts, an expert of several tiles, a last
    # tile that is not full, tiles that no expert has.
    "uneven": [100, 0, 5, 300, 30],
    "full": [128, 128, 128, 64, 64],
    "one_takes_all": [0, 0, 512, 0, 0],
    "one_row": [0, 0, 0, 1, 0],
}
TILING = SwiGLUTiling(Tile(128, 128), Tile(128, 384), 2**26)
OTHER = SwiGLUTiling(Tile(256, 384), Tile(256, 128), 2**26)
# Two blocks of rows in each piece.
TALL = SwiGLUTiling(Tile(512, 384), Tile(512, 384), 2**26)


def both(swiglu, group_size_E, dtype=jnp.float32):
    """hidden of forward; hidden, dgate_up, dweight of backward; rows used alone."""

    @jax.jit
    def run(x_RD, dy_RD, weight_R1, weights, group_size_E):
        hidden_RF, _ = swiglu.forward(x_RD, weight_R1, weights, group_size_E)
        back = swiglu.backward(x_RD, dy_RD, weight_R1, weights, group_size_E, None)
        return hidden_RF, *back

    used = int(np.sum(group_size_E))
    results = run(*draw(dtype), jnp.array(group_size_E, jnp.int32))
    return [np.asarray(result, np.float32)[:used] for result in results], results


@pytest.mark.parametrize("groups", list(GROUPS))
@pytest.mark.parametrize(
    "tiling",
    [
        pytest.param(TILING, id="narrow", marks=pytest.mark.long),
        pytest.param(OTHER, id="wide", marks=pytest.mark.long),
        pytest.param(TALL, id="tall"),
    ],
)
def test_fused_equals_plain(tiling, groups):
    actual, raw = both(fused_swiglu(tiling, interpret=True), GROUPS[groups])
    wanted, _ = both(plain_swiglu(REFERENCE), GROUPS[groups])
    assert [r.dtype for r in raw] == [jnp.float32] * 4
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-4, atol=2e-4 * np.abs(w).max())


def test_bfloat16_is_rounded_at_the_end_alone():
    actual, raw = both(fused_swiglu(TILING, interpret=True), GROUPS["uneven"], jnp.bfloat16)
    wanted, _ = both(plain_swiglu(REFERENCE), GROUPS["uneven"])
    assert [r.dtype for r in raw] == [jnp.bfloat16] * 3 + [jnp.float32]
    for a, w in zip(actual, wanted, strict=True):
        assert np.linalg.norm(a - w) <= 1e-2 * np.linalg.norm(w)


def test_tiles_by_hand():
    # F = 2 x 1408 = 11 x 256.  64 MiB of v5p hold the weights of half of it, twice 3 x 1024 x 1408
    # x 2 = 8.7 million bytes; 16 MiB of v4 do not.  The row tile is that of the other products.
    v5p = swiglu_tiling(65536, 16, 1024, 2816, 2, 166.0, 64 * 2**20)
    assert (v5p.forward, v5p.backward) == (Tile(256, 1408), Tile(256, 1408))
    v4 = swiglu_tiling(65536, 16, 1024, 2816, 2, 224.0, 16 * 2**20)
    assert v4.backward == Tile(256, 256)
    # F = 704 is no multiple of 128; rows of 2^20 numbers do not fit.
    assert swiglu_tiling(65536, 16, 1024, 704, 2, 166.0, 64 * 2**20) is None
    assert swiglu_tiling(65536, 16, 2**20, 2816, 2, 166.0, 64 * 2**20) is None


@pytest.mark.parametrize("vmem_mib", [16, 64, 128])
@pytest.mark.parametrize("shape", [(1024, 2816), (4096, 14336), (2048, 1024)])
def test_tiles_divide_and_fit(vmem_mib, shape):
    D, F = shape
    tiling = swiglu_tiling(65536, 16, D, F, 2, 240.0, vmem_mib * 2**20)
    for tile, products in ((tiling.forward, 2), (tiling.backward, 3)):
        assert F % tile.f == 0
        assert 65536 % tile.m == 0
        # The weights of a tile, twice, are the least that has to fit.
        assert 4 * products * D * tile.f < vmem_mib * 2**20
