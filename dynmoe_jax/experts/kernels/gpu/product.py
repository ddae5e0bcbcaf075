"""Product of row tiles with their experts' matrices, for NVIDIA GPUs.

Axis legend: R rows, E experts, V visits, I inner and O outer width of a matrix, and the tile sizes
m along rows, c along the columns of the result and k along what is summed over.
"""

import dataclasses
from functools import partial

import jax
from jax.experimental import pallas as pl

from dynmoe_jax.experts.kernels.gpu.tiling import Tile, dividing, visits_of
from dynmoe_jax.experts.kernels.gpu.visit import Visit, grid_of
from dynmoe_jax.hardware.triton import options

NAME = "grouped_product"


def product(tile: Tile, x_RI, w_EIO, group_size_E, *, transposed=False, interpret=False):
    """Row r times the matrix of its expert, or its transpose: [R, O] or, of [R, O], [R, I]."""
    rows, inner = x_RI.shape
    outer = w_EIO.shape[1 if transposed else 2]
    tile = dataclasses.replace(tile, c=dividing(tile.c, outer))
    visits = visits_of(group_size_E, rows, tile.m)
    bytes_of_tile = inner * tile.c * w_EIO.dtype.itemsize
    return pl.pallas_call(
        partial(_product_kernel, tile=tile, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((rows, outer), x_RI.dtype),
        grid=grid_of(outer // tile.c, visits[0].shape[0], bytes_of_tile),
        name=NAME,
        **options(tile.warps, tile.stages, interpret),
    )(*visits, x_RI, w_EIO)


def _product_kernel(expert_V, first_V, end_V, x_RI, w_EIO, y_RO, *, tile, transposed):
    visit = Visit.of(tile, expert_V, first_V, end_V)
    columns = visit.columns()

    def matrix(ks):
        return w_EIO.at[visit.expert, *((columns, ks) if transposed else (ks, columns))]

    @pl.when(visit.exists)
    def _():
        (y_mc,) = visit.sums(x_RI, [matrix], transposed)
        visit.store(y_RO, columns, y_mc)
