"""SwiGLU fused with the products before it and behind it, for NVIDIA GPUs.

Forward multiplies a row tile by a tile of gate and the same tile of up, and writes what is hidden
beside both, which backward is given: to read them again takes less time than to compute them again
(docs/measurements.md: h100-gate-up-read).  Backward makes the gradient of what is hidden, which
never reaches memory, and from it all others.

Axis legend: n rows of one part, E experts, V visits, D model width, F hidden width of an expert, J
tiles of F, and the tile sizes m along rows, c along F and k along what is summed over.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dynmoe_jax.experts.kernels.gpu.product import product
from dynmoe_jax.experts.kernels.gpu.tiling import Tiles, dividing, visits_of
from dynmoe_jax.experts.kernels.gpu.visit import Visit, grid_of
from dynmoe_jax.experts.kernels.swiglu import FORWARD, KEPT_BACKWARD, SwiGLU
from dynmoe_jax.experts.weights import gated
from dynmoe_jax.hardware.triton import options


@functools.cache
def triton_swiglu(tiles: Tiles, interpret: bool = False) -> SwiGLU:
    """Makes the kernels of SwiGLU with these tiles.

    Args:
      tiles: see :func:`~.tiling.tiles_for`.
      interpret: run the kernels on a CPU, slowly, for tests.
    """

    def forward(x_nD, weight_n1, weights, group_size_E):
        return _swiglu_forward(tiles, interpret, x_nD, weight_n1, weights, group_size_E)

    def backward(x_nD, dy_nD, weight_n1, weights, group_size_E, gate_up_n2F):
        if gate_up_n2F is None:
            gate_up_ED2F = weights.gate_up_ED2F
            gate_up_n2F = product(
                tiles.product, x_nD, gate_up_ED2F, group_size_E, interpret=interpret
            )
        return _swiglu_backward(
            tiles, interpret, gate_up_n2F, dy_nD, weight_n1, weights, group_size_E
        )

    return SwiGLU(forward, backward)


def _swiglu_forward(tiles, interpret, x_nD, weight_n1, weights, group_size_E):
    (rows, width), hidden = x_nD.shape, weights.hidden_width
    # Half of the columns of gate, half of up.
    tile = dataclasses.replace(tiles.swiglu, c=dividing(tiles.swiglu.c // 2, hidden))
    visits = visits_of(group_size_E, rows, tile.m)
    bytes_of_tile = 2 * width * tile.c * x_nD.dtype.itemsize
    return pl.pallas_call(
        partial(_forward_kernel, tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct((rows, hidden), x_nD.dtype),
            jax.ShapeDtypeStruct((rows, 2 * hidden), x_nD.dtype),
        ),
        grid=grid_of(hidden // tile.c, visits[0].shape[0], bytes_of_tile),
        name=FORWARD,
        **options(tile.warps, tile.stages, interpret),
    )(*visits, x_nD, weights.gate_up_ED2F, weight_n1[:, 0])


def _forward_kernel(
    expert_V, first_V, end_V, x_nD, gate_up_ED2F, weight_n, hidden_nF, gate_up_n2F, *, tile
):
    visit = Visit.of(tile, expert_V, first_V, end_V)
    halves = visit.columns(), visit.columns(hidden_nF.shape[1])

    @pl.when(visit.exists)
    def _():
        matrices = [
            lambda ks, half=half: gate_up_ED2F.at[visit.expert, ks, half] for half in halves
        ]
        gate_mc, up_mc = visit.sums(x_nD, matrices)
        for half, sum_mc in zip(halves, (gate_mc, up_mc), strict=True):
            visit.store(gate_up_n2F, half, sum_mc)
        weight_m1 = plgpu.load(weight_n.at[visit.row_m])[:, None]
        visit.store(hidden_nF, halves[0], gated(gate_mc, up_mc) * weight_m1)


def _swiglu_backward(tiles, interpret, gate_up_n2F, dy_nD, weight_n1, weights, group_size_E):
    (rows, width), hidden = dy_nD.shape, weights.hidden_width
    tile = dataclasses.replace(tiles.dswiglu, c=dividing(tiles.dswiglu.c, hidden))
    visits = visits_of(group_size_E, rows, tile.m)
    column_tiles = hidden // tile.c
    hidden_nF, dgate_up_n2F, dweight_Jn = pl.pallas_call(
        partial(_backward_kernel, tile=tile),
        out_shape=(
            jax.ShapeDtypeStruct((rows, hidden), dy_nD.dtype),
            jax.ShapeDtypeStruct((rows, 2 * hidden), dy_nD.dtype),
            jax.ShapeDtypeStruct((column_tiles, rows), jnp.float32),
        ),
        grid=grid_of(column_tiles, visits[0].shape[0], width * tile.c * dy_nD.dtype.itemsize),
        name=KEPT_BACKWARD,
        **options(tile.warps, tile.stages, interpret),
    )(*visits, dy_nD, weights.down_EFD, gate_up_n2F, weight_n1[:, 0])
    return hidden_nF, dgate_up_n2F, jnp.sum(dweight_Jn, axis=0)[:, None]


def _backward_kernel(
    expert_V, first_V, end_V, dy_nD, down_EFD, gate_up_n2F, weight_n,
    hidden_nF, dgate_up_n2F, dweight_Jn, *, tile
):  # fmt: skip
    visit = Visit.of(tile, expert_V, first_V, end_V)
    gate, up = visit.columns(), visit.columns(hidden_nF.shape[1])

    @pl.when(visit.exists)
    def _():
        (dhidden_mc,) = visit.sums(dy_nD, [lambda ks: down_EFD.at[visit.expert, gate, ks]], True)
        weight_m1 = plgpu.load(weight_n.at[visit.row_m])[:, None]
        # Gate and up are read for each result: kept, they and what is made of them take more
        # registers than there are.
        gate_mc, up_mc = visit.load(gate_up_n2F, gate), visit.load(gate_up_n2F, up)
        hidden_mc = gated(gate_mc, up_mc)
        # <dy, hidden down> = <dy down^T, hidden>.
        visit.store_numbers(dweight_Jn, jnp.sum(dhidden_mc * hidden_mc, axis=1))
        visit.store(hidden_nF, gate, hidden_mc * weight_m1)
        dhidden_mc *= weight_m1
        visit.store(dgate_up_n2F, up, dhidden_mc * jax.nn.silu(visit.load(gate_up_n2F, gate)))
        gate_mc, up_mc = visit.load(gate_up_n2F, gate), visit.load(gate_up_n2F, up)
        sigmoid_mc = jax.nn.sigmoid(gate_mc)
        dsilu_mc = sigmoid_mc * (1 + gate_mc * (1 - sigmoid_mc))
        visit.store(dgate_up_n2F, gate, dhidden_mc * up_mc * dsilu_mc)
