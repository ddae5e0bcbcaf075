"""Grouped matmul for NVIDIA GPUs, by kernels of our own.

A program computes a tile of rows that belong to one expert, which it reads from
:func:`~.tiling.visits_of`.  Rows beyond the groups are neither read nor written, matrices
are read as they lie, transposed or not, and the weight gradient of an expert without rows is zero.
(tokamax starts a program for every row tile and expert, most of them for nothing, and transposes
all weights for the gradient of the rows, XLA even the float32 stack of all layers;
docs/measurements.md: gpu-tokamax-grid, h100-transposed-weights)

Programs that run together share what they read: the tiles of a panel of an expert's matrix come
one after the other, for every row tile.

Axis legend: R rows, E experts, V visits, I inner and O outer width of a matrix, and the tile sizes
m along rows, c along the columns of the result and k along what is summed over.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from dynmoe_jax.experts.kernels.contract import GroupedProducts
from dynmoe_jax.experts.kernels.gpu.product import product
from dynmoe_jax.experts.kernels.gpu.swiglu import triton_swiglu
from dynmoe_jax.experts.kernels.gpu.tiling import Tile, Tiles, dividing, tiles_for
from dynmoe_jax.experts.kernels.gpu.visit import at
from dynmoe_jax.hardware.triton import dot, options

GRADIENT = "grouped_weight_gradient"


@functools.cache
def triton_products(
    shared_bytes: int, tiles: Tiles | None = None, interpret: bool = False
) -> GroupedProducts:
    """Makes the grouped matmuls.

    Args:
      shared_bytes: shared memory that a program may have.
      tiles: by default those of :func:`tiles_for`.
      interpret: run the kernels on a CPU, slowly, for tests.
    """

    def of(rows, experts):
        return tiles or tiles_for(rows, experts, shared_bytes)

    def forward(x_RI, w_EIO, group_size_E):
        tile = of(x_RI.shape[0], w_EIO.shape[0]).product
        return product(tile, x_RI, w_EIO, group_size_E, interpret=interpret)

    def input_gradient(dy_RO, w_EIO, group_size_E):
        tile = of(dy_RO.shape[0], w_EIO.shape[0]).product
        return product(tile, dy_RO, w_EIO, group_size_E, transposed=True, interpret=interpret)

    def weight_gradient(x_RI, dy_RO, group_size_E):
        tile = of(x_RI.shape[0], group_size_E.shape[0]).gradient
        return gradient(tile, x_RI, dy_RO, group_size_E, interpret=interpret)

    def swiglu(rows, dtype, weights):
        return triton_swiglu(of(rows, weights.num_experts), interpret)

    return GroupedProducts(
        "triton",
        forward,
        input_gradient,
        weight_gradient,
        zeroes_empty=True,
        ignores_padding=True,
        swiglu=swiglu,
    )


def gradient(tile: Tile, x_RI, dy_RO, group_size_E, *, interpret=False):
    """Grouped weight gradient: ``x_eᵀ dy_e`` for every expert, [E, I, O]."""
    inner, outer = x_RI.shape[1], dy_RO.shape[1]
    tile = dataclasses.replace(tile, m=dividing(tile.m, inner), c=dividing(tile.c, outer))
    end_E = jnp.cumsum(group_size_E)
    experts = group_size_E.shape[0]
    return pl.pallas_call(
        partial(_gradient_kernel, tile=tile),
        out_shape=jax.ShapeDtypeStruct((experts, inner, outer), x_RI.dtype),
        grid=(inner // tile.m, outer // tile.c, experts),
        name=GRADIENT,
        **options(tile.warps, tile.stages, interpret),
    )(end_E - group_size_E, end_E, x_RI, dy_RO)


def _gradient_kernel(first_E, end_E, x_RI, dy_RO, dw_EIO, *, tile):
    expert = pl.program_id(2)
    first, end = first_E[expert], end_E[expert]
    inner = pl.ds(pl.program_id(0) * tile.m, tile.m)
    outer = pl.ds(pl.program_id(1) * tile.c, tile.c)

    def add(i, sum_mc):
        row_k = first + i * tile.k + jnp.arange(tile.k)
        mask = (row_k < end)[:, None]
        x_km, dy_kc = (
            plgpu.load(at(ref, row_k, columns), mask=mask, other=0)
            for ref, columns in ((x_RI, inner), (dy_RO, outer))
        )
        return sum_mc + dot(x_km, dy_kc, trans_a=True)

    zeros_mc = jnp.zeros((tile.m, tile.c), jnp.float32)
    sum_mc = jax.lax.fori_loop(0, pl.cdiv(end - first, tile.k), add, zeros_mc)
    plgpu.store(dw_EIO.at[expert, inner, outer], sum_mc.astype(dw_EIO.dtype))
