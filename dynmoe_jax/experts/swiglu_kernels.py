"""SwiGLU fused with its products, for TPU.

Gate and up never reach main memory: forward writes hidden activations alone; backward computes gate
and up again, and the gradient of the hidden activations, in the same visit of a tile of rows.  On
a chip whose products outrun its memory that is cheaper than to write, stack and read them again:
in a step of the paper's model compiled for v5p, passes over [n, 2F] were 167 of 874 ms.

For every tile of F, the grid visits the (row tile, expert) pairs that exist.  A row tile that two
experts share is visited by both, one after the other, and each writes its own rows.

Axis legend: n rows, E experts, D model width, F hidden width of an expert, m rows and f hidden
columns of a tile, J tiles of F.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from dynmoe_jax.experts.swiglu import BACKWARD, FORWARD, SwiGLU
from dynmoe_jax.experts.swiglu_tiling import SwiGLUTiling, Tile
from dynmoe_jax.target import TPU_LANES

_ROWS_BY_WIDTH = (((1,), (0,)), ((), ()))
_ROWS_BY_TRANSPOSED = (((1,), (1,)), ((), ()))


@functools.cache
def fused_swiglu(tiling: SwiGLUTiling, interpret: bool = False) -> SwiGLU:
    """The kernels with the tiles of :func:`swiglu_tiling`.

    Args:
      tiling: sizes of the tiles.
      interpret: run the kernels on a CPU, slowly, for tests.
    """

    def forward(x_nD, weight_n1, weights, group_size_E):
        hidden_nF = _forward(tiling, interpret, x_nD, weight_n1, weights, group_size_E)
        return hidden_nF, None

    def backward(x_nD, dy_nD, weight_n1, weights, group_size_E, kept):
        return _backward(tiling, interpret, x_nD, dy_nD, weight_n1, weights, group_size_E)

    return SwiGLU(forward, backward, keeps=False)


def _forward(tiling, interpret, x_nD, weight_n1, weights, group_size_E):
    rows, hidden = x_nD.shape[0], weights.hidden_width
    tile, blocks = tiling.forward, _Blocks(tiling.forward, hidden)
    metadata, count = _visits(group_size_E, rows, tile.m)
    call = pl.pallas_call(
        _forward_kernel,
        out_shape=jax.ShapeDtypeStruct((rows, hidden), x_nD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            in_specs=[blocks.rows(x_nD), *blocks.gate_and_up(x_nD), blocks.row()],
            out_specs=blocks.hidden(),
            grid=(hidden // tile.f, count),
        ),
        name=FORWARD,
        **_options(tiling, interpret, x_nD, weights, products=2, sides=1, results=1),
    )
    return call(*metadata, x_nD, weights.gate_up_ED2F, weights.gate_up_ED2F, weight_n1.T)


def _forward_kernel(offset_e, expert_v, tile_v, x, gate, up, weight, hidden):
    gate_mf, up_mf = (_product(x[...], w[...], _ROWS_BY_WIDTH) for w in (gate, up))
    hidden_mf = jax.nn.silu(gate_mf) * up_mf * _as_column(weight[...])
    _write(hidden, hidden_mf, _mine(offset_e, expert_v, tile_v, (hidden.shape[0], 1)))


def _backward(tiling, interpret, x_nD, dy_nD, weight_n1, weights, group_size_E):
    rows, hidden = x_nD.shape[0], weights.hidden_width
    tile, blocks = tiling.backward, _Blocks(tiling.backward, hidden)
    metadata, count = _visits(group_size_E, rows, tile.m)
    tiles = hidden // tile.f
    call = pl.pallas_call(
        partial(_backward_kernel, hidden=hidden),
        out_shape=(
            jax.ShapeDtypeStruct((rows, hidden), x_nD.dtype),
            jax.ShapeDtypeStruct((rows, 2 * hidden), x_nD.dtype),
            jax.ShapeDtypeStruct((tiles, 1, rows), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            in_specs=[
                *(blocks.rows(x_nD), blocks.rows(dy_nD), *blocks.gate_and_up(x_nD)),
                *(blocks.down(x_nD), blocks.row()),
            ],
            out_specs=(
                blocks.hidden(),
                # Gate and up lie F columns apart: the kernel copies the two tiles by itself.
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, 1, tile.m), lambda j, v, o, e, tile_v: (j, 0, tile_v[v])),
            ),
            grid=(tiles, count),
            scratch_shapes=[
                pltpu.VMEM((2, 2, tile.m, tile.f), x_nD.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        name=BACKWARD,
        **_options(tiling, interpret, x_nD, weights, products=3, sides=2, results=3),
    )
    gate_up_ED2F = weights.gate_up_ED2F
    hidden_nF, dgate_up_n2F, dweight_J1n = call(
        *metadata, x_nD, dy_nD, gate_up_ED2F, gate_up_ED2F, weights.down_EFD, weight_n1.T
    )
    return hidden_nF, dgate_up_n2F, jnp.sum(dweight_J1n, axis=0).T


def _backward_kernel(
    offset_e, expert_v, tile_v, x, dy, gate, up, down, weight,
    hidden_out, dgate_up_out, dweight_out, held, copied, *, hidden
):  # fmt: skip
    v, last = pl.program_id(1), pl.num_programs(1) - 1
    tile, first_column = tile_v[v], pl.program_id(0) * held.shape[-1]
    copies = partial(_copies, held, dgate_up_out, copied, (first_column, hidden + first_column))
    begins = (v == 0) | (tile_v[jnp.maximum(v - 1, 0)] != tile)
    ends = (v == last) | (tile_v[jnp.minimum(v + 1, last)] != tile)

    @pl.when(begins & (tile >= 2))
    def _():  # two tiles are held, so the last but one has to be out
        for copy in copies(tile - 2):
            copy.wait()

    mine_m1, mine_1m = (
        _mine(offset_e, expert_v, tile_v, shape) for shape in ((x.shape[0], 1), (1, x.shape[0]))
    )
    gate_mf, up_mf = (_product(x[...], w[...], _ROWS_BY_WIDTH) for w in (gate, up))
    dhidden_mf = _product(dy[...], down[...], _ROWS_BY_TRANSPOSED)
    sigmoid_mf = jax.nn.sigmoid(gate_mf)
    silu_mf = gate_mf * sigmoid_mf
    hidden_mf = silu_mf * up_mf
    weight_m1 = _as_column(weight[...])
    _write(hidden_out, hidden_mf * weight_m1, mine_m1)
    dweight_m1 = jnp.sum(dhidden_mf * hidden_mf, axis=-1, keepdims=True)
    _write(dweight_out, _as_row(dweight_m1), mine_1m)
    dhidden_mf *= weight_m1
    dsilu_mf = sigmoid_mf + silu_mf * (1 - sigmoid_mf)
    _write(held.at[tile % 2, 0], dhidden_mf * up_mf * dsilu_mf, mine_m1)
    _write(held.at[tile % 2, 1], dhidden_mf * silu_mf, mine_m1)

    @pl.when(ends)
    def _():
        for copy in copies(tile):
            copy.start()

    @pl.when(v == last)
    def _():
        for copy in copies(tile):
            copy.wait()

    @pl.when((v == last) & (tile >= 1))
    def _():
        for copy in copies(tile - 1):
            copy.wait()


def _copies(held, dgate_up_out, copied, first_columns, tile):
    """The copies of the two halves of a held tile to main memory."""
    m, f = held.shape[2:]
    slot, rows = tile % 2, pl.ds(pl.multiple_of(tile * m, m), m)
    return [
        pltpu.make_async_copy(
            held.at[slot, half],
            dgate_up_out.at[rows, pl.ds(pl.multiple_of(first, TPU_LANES), f)],
            copied.at[slot, half],
        )
        for half, first in enumerate(first_columns)
    ]


class _Blocks:
    """What each visit reads and writes; index maps get (j, visit, offsets, experts, tiles)."""

    def __init__(self, tile: Tile, hidden: int):
        self.m, self.f = tile.m, tile.f
        self.tiles = hidden // tile.f

    def rows(self, x_nD):
        return pl.BlockSpec((self.m, x_nD.shape[1]), lambda j, v, o, e, tile_v: (tile_v[v], 0))

    def row(self):
        """One number for each row, side by side: a column would take 128 lanes for each."""
        return pl.BlockSpec((1, self.m), lambda j, v, o, e, tile_v: (0, tile_v[v]))

    def hidden(self):
        return pl.BlockSpec((self.m, self.f), lambda j, v, o, e, tile_v: (tile_v[v], j))

    def gate_and_up(self, x_nD):
        shape = (None, x_nD.shape[1], self.f)
        gate = pl.BlockSpec(shape, lambda j, v, o, expert_v, t: (expert_v[v], 0, j))
        up = pl.BlockSpec(shape, lambda j, v, o, expert_v, t: (expert_v[v], 0, self.tiles + j))
        return gate, up

    def down(self, x_nD):
        shape = (None, self.f, x_nD.shape[1])
        return pl.BlockSpec(shape, lambda j, v, o, expert_v, t: (expert_v[v], j, 0))


def _visits(group_size_E, rows, m):
    """(first row of each expert, expert and row tile of each visit), how many visits."""
    return make_group_metadata(
        group_sizes=group_size_E,
        m=rows,
        tm=m,
        start_group=jnp.int32(0),
        num_nonzero_groups=group_size_E.shape[0],
        visit_empty_groups=False,
    )


def _options(tiling, interpret, x_nD, weights, *, products: int, sides: int, results: int):
    """What both calls say of themselves; sides are arrays [n, D], results arrays [n, F]."""
    (rows, width), hidden = x_nD.shape, weights.hidden_width
    moved = rows * (sides * width + results * hidden) + products * weights.down_EFD.size
    return {
        # Tiles of F are independent: the two cores of a v4 or v5p share them.
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * rows * width * hidden,
            bytes_accessed=moved * x_nD.dtype.itemsize,
            transcendentals=rows * hidden,
        ),
        "interpret": interpret,
    }


def _product(left, right, dimensions):
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _mine(offset_e, expert_v, tile_v, shape):
    """Whether a row of this visit's tile belongs to its expert; rows are the longer axis."""
    v = pl.program_id(1)
    row = tile_v[v] * max(shape) + jax.lax.broadcasted_iota(jnp.int32, shape, int(shape[0] == 1))
    return (row >= offset_e[expert_v[v]]) & (row < offset_e[expert_v[v] + 1])


def _as_row(values_m1):
    """[1, m]."""
    return jnp.broadcast_to(values_m1, (values_m1.shape[0], TPU_LANES)).T[:1]


def _as_column(values_1m):
    """[m, 1]."""
    return jnp.broadcast_to(values_1m, (TPU_LANES, values_1m.shape[1])).T[:, :1]


def _write(ref, values, mine):
    """Writes the rows of this visit's expert, and leaves those of others."""
    ref[...] = jnp.where(mine, values, ref[...].astype(jnp.float32)).astype(ref.dtype)
