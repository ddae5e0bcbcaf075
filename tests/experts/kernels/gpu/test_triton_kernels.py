"""The kernels for NVIDIA GPUs, in interpret mode, against the products and passes they replace."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts import ExpertWeights, rows_from_routing
from dynmoe_jax.experts.kernels.contract import REFERENCE
from dynmoe_jax.experts.kernels.gpu.gmm import triton_products
from dynmoe_jax.experts.kernels.gpu.swiglu import triton_swiglu
from dynmoe_jax.experts.kernels.gpu.tiling import Tile, Tiles, tiles_for, visits_of
from dynmoe_jax.experts.kernels.gpu.visit import Visit, grid_of
from dynmoe_jax.experts.kernels.grouped import ragged_experts
from dynmoe_jax.experts.kernels.swiglu import plain_swiglu
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.routing import TopP
from tests.close import assert_close
from tests.experts.kernels.grouped_case import E, R, draw

GROUPS = {
    "uneven": [100, 0, 5, 300, 30],
    "full": [128, 128, 128, 64, 64],
    "one_takes_all": [0, 0, 512, 0, 0],
    "one_row": [0, 0, 0, 1, 0],
    "no_rows": [0, 0, 0, 0, 0],
}
OF_EACH_KIND = [
    name if name in ("uneven", "no_rows") else pytest.param(name, marks=pytest.mark.long)
    for name in GROUPS
]
TILE = Tile(64, 128, 64, 4, 3)
# Tiles that do not divide a width are made smaller; sums over one and over two pieces.
TILES = Tiles(TILE, Tile(256, 128, 64, 4, 3), dataclasses.replace(TILE, c=256), TILE)
PRODUCTS = triton_products(0, TILES, interpret=True)


def spoil(x_RD, used):
    """NaN beyond the groups, where kernels leave anything."""
    return jnp.where(jnp.arange(R)[:, None] < used, x_RD, jnp.nan)


def close(actual, wanted, share=2e-4):
    actual, wanted = (np.asarray(x, np.float32) for x in (actual, wanted))
    np.testing.assert_allclose(
        actual, wanted, rtol=0, atol=share * np.abs(wanted).max(initial=1e-6)
    )


@pytest.mark.parametrize("groups", OF_EACH_KIND)
def test_products_equal_the_reference(groups):
    group_size_E, used = jnp.array(GROUPS[groups], jnp.int32), sum(GROUPS[groups])
    x_RD, dy_RD, _, weights = draw()
    wide_RF = x_RD @ weights.gate_up_ED2F[0]
    for name, left, right in (
        ("forward", x_RD, weights.gate_up_ED2F),
        ("input_gradient", wide_RF, weights.gate_up_ED2F),
        ("weight_gradient", x_RD, wide_RF),
        ("weight_gradient", wide_RF, dy_RD),
    ):
        sides = (spoil(left, used), right if right.ndim == 3 else spoil(right, used))
        actual = getattr(PRODUCTS, name)(*sides, group_size_E)
        wanted = getattr(REFERENCE, name)(left, right, group_size_E)
        every = slice(None) if name == "weight_gradient" else slice(used)
        close(actual[every], wanted[every])


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "computed_again"])
@pytest.mark.parametrize("groups", OF_EACH_KIND)
def test_swiglu_equals_the_passes_it_replaces(groups, kept):
    group_size_E, used = jnp.array(GROUPS[groups], jnp.int32), sum(GROUPS[groups])
    x_RD, dy_RD, weight_R1, weights = draw()
    fused, plain = triton_swiglu(TILES, interpret=True), plain_swiglu(REFERENCE)

    def run(swiglu, x_RD, dy_RD):
        hidden_RF, gate_up_R2F = swiglu.forward(x_RD, weight_R1, weights, group_size_E)
        given = gate_up_R2F if kept else None
        back = swiglu.backward(x_RD, dy_RD, weight_R1, weights, group_size_E, given)
        return hidden_RF, gate_up_R2F, *back

    actual = run(fused, spoil(x_RD, used), spoil(dy_RD, used))
    for a, w in zip(actual, run(plain, x_RD, dy_RD), strict=True):
        close(a[:used], w[:used])


def test_bfloat16_is_rounded_at_the_end_alone():
    group_size_E, used = jnp.array(GROUPS["uneven"], jnp.int32), sum(GROUPS["uneven"])
    x_RD, _, _, weights = draw(jnp.bfloat16)
    exact = ExpertWeights(
        *(w.astype(jnp.float32) for w in (weights.gate_up_ED2F, weights.down_EFD))
    )
    actual = PRODUCTS.forward(x_RD, weights.gate_up_ED2F, group_size_E)[:used]
    wanted = REFERENCE.forward(x_RD.astype(jnp.float32), exact.gate_up_ED2F, group_size_E)[:used]
    assert actual.dtype == jnp.bfloat16
    error = np.abs(np.asarray(actual, np.float32) - np.asarray(wanted))
    assert np.all(error <= 2**-8 * np.abs(wanted) + 1e-3)


@pytest.mark.parametrize(
    "saved",
    [pytest.param(1.0, id="chunks"), pytest.param(9.0, id="one_part", marks=pytest.mark.long)],
)
def test_layer_equals_the_reference(saved):
    x_RD, _, _, weights = draw()
    x_TD = x_RD[:96]
    logits_TE = jax.random.normal(jax.random.key(7), (96, E)).at[:, 1].add(-50.0)
    mix_TD = jax.random.normal(jax.random.key(9), x_TD.shape)

    def gradients(backend):
        def loss(x_TD, logits_TE, weights):
            routing = TopP(0.6).on_logits(logits_TE, jnp.arange(96) % 5 > 0)
            y_TD, _ = backend(x_TD, rows_from_routing(routing), weights)
            return jnp.sum(y_TD * mix_TD), y_TD

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        return run(x_TD, logits_TE, weights)

    backend = partial(ragged_experts, products=PRODUCTS, saved_rows_per_token=saved)
    assert_close(gradients(backend), gradients(reference_experts), 1e-4)


def test_a_tile_writes_no_rows_of_others():
    # Programs run one after the other here, and at once on a GPU.  What none writes is NaN here.
    x_RD, dy_RD, weight_R1, weights = draw()
    group_size_E = jnp.array([0, 0, 70, 0, 0], jnp.int32)
    swiglu = triton_swiglu(TILES, interpret=True)
    results = (
        PRODUCTS.forward(x_RD, weights.gate_up_ED2F, group_size_E),
        *swiglu.forward(x_RD, weight_R1, weights, group_size_E),
        *swiglu.backward(x_RD, dy_RD, weight_R1, weights, group_size_E, None),
    )
    for result in results:
        assert np.all(np.isfinite(result[:70]))
        assert np.all(np.isnan(result[70:]))


def test_a_tile_reads_no_rows_of_others():
    visit = Visit(Tile(8, 128, 64, 4, 3), *(jnp.int32(n) for n in (0, 30, 33, 0)))
    np.testing.assert_array_equal(visit.row_m, [30, 31, 32, 32, 32, 32, 32, 32])


def test_visits_by_hand():
    # Experts of 5, 0, 9 and 4 rows in tiles of 4; there may be 20 / 4 + 4 of them.
    expert_V, first_V, end_V = visits_of(jnp.array([5, 0, 9, 4]), 20, 4)
    exists_V = np.asarray(first_V < end_V)
    np.testing.assert_array_equal(exists_V, [True] * 6 + [False] * 3)
    np.testing.assert_array_equal(expert_V[:6], [0, 0, 2, 2, 2, 3])
    np.testing.assert_array_equal(first_V[:6], [0, 4, 5, 9, 13, 14])
    np.testing.assert_array_equal(end_V[:6], [5, 5, 14, 14, 14, 18])


@pytest.mark.parametrize("rows_of_each", [1, 4, 5])
def test_there_are_visits_enough(rows_of_each):
    expert_V, first_V, end_V = visits_of(jnp.full(7, rows_of_each), 7 * rows_of_each, 4)
    visited = {
        (int(e), row)
        for e, first, end in zip(expert_V, first_V, end_V, strict=True)
        for row in range(int(first), min(int(first) + 4, int(end)))
    }
    wanted = {(row // rows_of_each, row) for row in range(7 * rows_of_each)}
    assert visited == wanted


def test_grids_by_hand():
    # 22 tiles of 0.5 MB are 11 MB: one panel.  56 of 2 MB: 7 are 14 MB, 8 would be 16 MB.
    assert grid_of(22, 100, 2**19) == (22, 100, 1)
    assert grid_of(56, 100, 2**21) == (8, 100, 7)
    assert grid_of(56, 100, 2**21 + 1) == (7, 100, 8)
    assert grid_of(3, 100, 2**30) == (1, 100, 3)


def gpu(capability):
    return Target("gpu", compute_capability=capability)


@pytest.mark.parametrize("capability", [8.0, 8.6, 8.9, 9.0, 10.0, 12.0])
@pytest.mark.parametrize("rows", [16, 1000, 2**16, 2**20])
def test_tiles_fit(capability, rows):
    memory = gpu(capability).shared_bytes
    for tile in dataclasses.astuple(tiles_for(rows, 16, memory)):
        m, c, k, warps, stages = tile
        assert 2 * k * (m + c) * stages <= memory
        # Sums in half of the 255 registers of a thread.
        assert m * c <= 128 * 32 * warps


def test_tiles_by_hand():
    h100 = tiles_for(65536, 16, gpu(9.0).shared_bytes)
    assert (h100.product, h100.dswiglu) == (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3))
    # An RTX 4090 has 99 kB.  Four rows for each expert: the smallest tile.
    assert tiles_for(65536, 16, gpu(8.9).shared_bytes).product == Tile(128, 256, 32, 8, 3)
    assert tiles_for(64, 16, gpu(9.0).shared_bytes).product == Tile(16, 128, 64, 4, 3)
