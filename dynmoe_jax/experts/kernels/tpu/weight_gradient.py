"""Grouped weight gradient for TPU: the rows of each expert, transposed, times dy.

The grid visits the (row tile, expert) pairs that exist, and one for each expert without rows, which
gets zeros.  A tile that one expert has to itself is one product, and nothing is masked.  Of a tile
that experts share, or that is not full, the blocks that hold rows of the visit's expert are
computed, with all other rows zero on both sides: these may hold anything, NaN included.

Products take most of a visit of a whole tile if tiles are wide and rows are many: each visit reads
and writes all sums, in float32, and each step of a grid costs something besides
(docs/measurements.md: v6e-weight-gradient).

Axis legend: R rows, E experts, I and O the inner and outer width of a matrix, and the tile sizes m
along rows, k along I and n along O; b rows of a block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.kernels.tpu.weight_gradient_tiling import GradientTiling

_OVER_ROWS = (((0,), (0,)), ((), ()))


def weight_gradient(
    tiling: GradientTiling,
    x_RI: Float[Array, "R I"],
    dy_RO: Float[Array, "R O"],
    group_size_E: Int[Array, "E"],
    interpret: bool = False,
) -> Float[Array, "E I O"]:
    """Per expert the sum of x^T dy over its rows, in the type of x; sums run in float32.

    Args:
      tiling: sizes of the tiles; m divides R.
      x_RI: rows sorted by expert; those beyond the groups may hold anything.
      dy_RO: gradients of what the matrices made of them; likewise.
      group_size_E: rows of each expert; one without rows gets zeros.
      interpret: run the kernel on a CPU, slowly, for tests.
    """
    (rows, inner), outer, experts = x_RI.shape, dy_RO.shape[1], group_size_E.shape[0]
    m, k, n = tiling.m, tiling.k, tiling.n
    across, down = pl.cdiv(outer, n), pl.cdiv(inner, k)
    metadata, visits = make_group_metadata(
        group_sizes=group_size_E,
        m=rows,
        tm=m,
        start_group=jnp.int32(0),
        num_nonzero_groups=experts,
        visit_empty_groups=True,
    )
    moved = x_RI.size * across + dy_RO.size * down + experts * inner * outer
    call = pl.pallas_call(
        partial(_kernel, block=tiling.block),
        out_shape=jax.ShapeDtypeStruct((experts, inner, outer), x_RI.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            in_specs=[
                pl.BlockSpec((m, k), lambda j, v, o, e, tile_v: (tile_v[v], j % down)),
                pl.BlockSpec((m, n), lambda j, v, o, e, tile_v: (tile_v[v], j // down)),
            ],
            out_specs=pl.BlockSpec(
                (None, k, n), lambda j, v, o, expert_v, t: (expert_v[v], j % down, j // down)
            ),
            grid=(across * down, visits),
            scratch_shapes=[pltpu.VMEM((k, n), jnp.float32)],
        ),
        # Tiles of I and O are independent: the two cores of a v4 or v5p share them.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * outer,
            bytes_accessed=moved * x_RI.dtype.itemsize,
            transcendentals=0,
        ),
        name="tgmm",
        interpret=interpret,
    )
    return call(*metadata, x_RI, dy_RO)


def _kernel(offset_e, expert_v, tile_v, x, dy, dw, sum_kn, *, block):
    v, m = pl.program_id(1), x.shape[0]
    expert, first = expert_v[v], tile_v[v] * m
    start, end = offset_e[expert], offset_e[expert + 1]
    whole = (start <= first) & (end >= first + m)

    def add(x_bk, dy_bn, row):
        product_kn = jax.lax.dot_general(
            x_bk, dy_bn, _OVER_ROWS, preferred_element_type=jnp.float32
        )
        # What an expert's first rows find are the sums of the one before.
        sum_kn[...] = jnp.where(start >= row, 0.0, sum_kn[...]) + product_kn

    @pl.when(whole)
    def _():
        add(x[...], dy[...], first)

    def add_block(i, _):
        at = pl.multiple_of(i * block, block)
        row_b1 = first + at + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
        mine_b1 = (row_b1 >= start) & (row_b1 < end)
        x_bk, dy_bn = (jnp.where(mine_b1, ref[pl.ds(at, block)], 0) for ref in (x, dy))
        add(x_bk, dy_bn, first + at)

    @pl.when(~whole & (start < end))
    def _():
        from_row, to_row = jnp.maximum(start - first, 0), jnp.minimum(end - first, m)
        jax.lax.fori_loop(from_row // block, pl.cdiv(to_row, block), add_block, None)

    @pl.when((end <= first + m) | (start == end))
    def _():
        dw[...] = jnp.where(start == end, 0.0, sum_kn[...]).astype(dw.dtype)
