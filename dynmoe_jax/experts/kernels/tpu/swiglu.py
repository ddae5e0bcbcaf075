"""SwiGLU fused with its products, for TPU.

Gate and up never reach main memory: forward writes hidden activations alone; backward computes gate
and up again, and the gradient of the hidden activations, in the same visit of a tile of rows.  On
a chip whose products outrun its memory that is cheaper than to write, stack and read them again
(docs/measurements.md: v5p-gate-up-passes).

For every tile of F, the grid visits the (row tile, expert) pairs that exist.  A row tile that two
experts share is visited by both, one after the other; the later puts back the rows of before.

A tile is worked on in pieces, so that the matrix units make gate and up of the next piece while the
vector units have those of this one.

Axis legend: n rows, E experts, D model width, F hidden width of an expert, m rows and f hidden
columns of a tile, J tiles of F, r rows of a piece, P the 128 lanes of a register.
"""

import collections
import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from dynmoe_jax.experts.kernels.swiglu import BACKWARD, FORWARD, SwiGLU
from dynmoe_jax.experts.kernels.tpu.swiglu_tiling import SwiGLUTiling, Tile
from dynmoe_jax.experts.weights import gated
from dynmoe_jax.hardware.target import TPU_LANES

ROWS = 256
"""Most rows of a piece; it has 128 columns of gate and as many of up."""

_ROWS_BY_WIDTH = (((1,), (0,)), ((), ()))
_ROWS_BY_TRANSPOSED = (((1,), (1,)), ((), ()))


@functools.cache
def fused_swiglu(tiling: SwiGLUTiling, interpret: bool = False) -> SwiGLU:
    """Makes the kernels of SwiGLU with the tiles of :func:`swiglu_tiling`.

    Args:
      tiling: sizes of the tiles.
      interpret: run the kernels on a CPU, slowly, for tests.
    """

    def forward(x_nD, weight_n1, weights, group_size_E):
        hidden_nF = _swiglu_forward(tiling, interpret, x_nD, weight_n1, weights, group_size_E)
        return hidden_nF, None

    def backward(x_nD, dy_nD, weight_n1, weights, group_size_E, kept):
        return _swiglu_backward(tiling, interpret, x_nD, dy_nD, weight_n1, weights, group_size_E)

    return SwiGLU(forward, backward, keeps=False)


def _swiglu_forward(tiling, interpret, x_nD, weight_n1, weights, group_size_E):
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
            scratch_shapes=[pltpu.VMEM((tile.m, tile.f), x_nD.dtype)],
        ),
        name=FORWARD,
        **_options(tiling, interpret, x_nD, weights, products=2, sides=1, results=1),
    )
    return call(*metadata, x_nD, weights.gate_up_ED2F, weights.gate_up_ED2F, weight_n1.T)


def _forward_kernel(offset_e, expert_v, tile_v, x, gate, up, weight, hidden, others):
    v = pl.program_id(1)
    begins, before = _begins(tile_v, v), _rows_before(offset_e, expert_v, tile_v, v, hidden)

    @pl.when(~begins)
    def _():
        _copy(others, hidden)

    weight_mP = _on_lanes(weight[...])
    for rows, columns, gate_rP, up_rP in _pieces(x, gate, up):
        hidden_rP = gated(gate_rP, up_rP) * weight_mP[rows]
        hidden[rows, columns] = hidden_rP.astype(hidden.dtype)

    @pl.when(~begins)
    def _():
        _copy(hidden, others, before)


def _swiglu_backward(tiling, interpret, x_nD, dy_nD, weight_n1, weights, group_size_E):
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
                pltpu.VMEM((3, tile.m, tile.f), x_nD.dtype),
                pltpu.VMEM((tile.m, x_nD.shape[1]), x_nD.dtype),
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
    hidden_out, dgate_up_out, dweight_out, held, copied, others, x_mD, *, hidden
):  # fmt: skip
    v, last = pl.program_id(1), pl.num_programs(1) - 1
    tile, first_column = tile_v[v], pl.program_id(0) * held.shape[-1]
    copies = partial(_copies, held, dgate_up_out, copied, (first_column, hidden + first_column))
    begins = _begins(tile_v, v)
    ends = (v == last) | (tile_v[jnp.minimum(v + 1, last)] != tile)

    @pl.when(begins & (tile >= 2))
    def _():  # two tiles are held, so the last but one has to be out
        for copy in copies(tile - 2):
            copy.wait()

    results = [hidden_out, held.at[tile % 2, 0], held.at[tile % 2, 1]]
    before = _rows_before(offset_e, expert_v, tile_v, v, x)

    @pl.when(~begins)
    def _():
        for i, result in enumerate(results):
            _copy(others.at[i], result)

    dhidden_mf = _product(dy[...], down[...], _ROWS_BY_TRANSPOSED)
    # A block lies in memory as XLA lays out arrays; as the products want it, if copied once.
    x_mD[...] = x[...]
    pieces = _pieces(x_mD, gate, up)
    dweight_1m = _gradients(results, pieces, dhidden_mf, _on_lanes(weight[...]))

    @pl.when(~begins)
    def _():
        for i, result in enumerate(results):
            _copy(result, others.at[i], before)

    row_1m = jax.lax.broadcasted_iota(jnp.int32, dweight_out.shape, 1)
    dweight_out[...] = jnp.where(row_1m < before, dweight_out[...], dweight_1m)

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


def _gradients(results, pieces, dhidden_mf, weight_mP):
    """Writes hidden and the gradients of gate and up; returns that of the weights, [1, m]."""
    hidden_out, dgate_out, dup_out = results
    dweight_rP = collections.defaultdict(float)
    for rows, columns, gate_rP, up_rP in pieces:
        dhidden_rP, weight_rP = dhidden_mf[rows, columns], weight_mP[rows]
        sigmoid_rP = jax.nn.sigmoid(gate_rP)
        silu_rP = gate_rP * sigmoid_rP
        hidden_rP = silu_rP * up_rP
        hidden_out[rows, columns] = (hidden_rP * weight_rP).astype(hidden_out.dtype)
        dweight_rP[rows.start] += dhidden_rP * hidden_rP
        dhidden_rP *= weight_rP
        dsilu_rP = sigmoid_rP + silu_rP * (1 - sigmoid_rP)
        dgate_out[rows, columns] = (dhidden_rP * up_rP * dsilu_rP).astype(dgate_out.dtype)
        dup_out[rows, columns] = (dhidden_rP * silu_rP).astype(dup_out.dtype)
    # The lanes are put together once.
    return jnp.sum(jnp.concatenate(list(dweight_rP.values())).T, axis=0, keepdims=True)


def _copies(held, dgate_up_out, copied, first_columns, tile):
    """Copies of the two halves of a held tile to main memory, not started."""
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
    """Blocks that a visit reads and writes; index maps get (j, visit, offsets, experts, tiles)."""

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
    """Compiler parameters and cost estimate shared by both calls.

    Args:
      tiling: sizes of the tiles.
      interpret: run the kernel on a CPU.
      x_nD: the rows.
      weights: the experts.
      products: matmuls for each tile.
      sides: arrays [n, D] that are read.
      results: arrays [n, F] that are written.
    """
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


def _pieces(x, gate, up):
    """(rows, columns, gate, up) of the pieces, all rows of a column together.

    The products of a piece are begun before those of the piece before it are given out, for the
    matrix units to work on them meanwhile.
    """
    m, f = x.shape[0], gate.shape[1]
    spans = [
        (slice(row, min(row + ROWS, m)), slice(column, column + TPU_LANES))
        for column in range(0, f, TPU_LANES)
        for row in range(0, m, ROWS)
    ]

    def products(rows, columns):
        # As one product they fill a matrix unit of 256 columns.
        gate_up_D2P = jnp.concatenate([gate[:, columns], up[:, columns]], axis=1)
        return jnp.split(_product(x[rows], gate_up_D2P, _ROWS_BY_WIDTH), 2, axis=1)

    following = products(*spans[0])
    for at, span in enumerate(spans):
        made = following
        if at + 1 < len(spans):
            following = products(*spans[at + 1])
        yield *span, *made


def _begins(tile_v, v):
    """Whether a visit is the first of its row tile."""
    return (v == 0) | (tile_v[jnp.maximum(v - 1, 0)] != tile_v[v])


def _rows_before(offset_e, expert_v, tile_v, v, tile):
    """Number of rows of a visit's tile that belong to experts before its own."""
    return offset_e[expert_v[v]] - tile_v[v] * tile.shape[0]


def _copy(to, source, count=None):
    """Copies a tile, or its first rows alone, as many as count says."""

    @pl.loop(0, to.shape[1] // TPU_LANES)
    def _(block):
        at = pl.ds(pl.multiple_of(block * TPU_LANES, TPU_LANES), TPU_LANES)
        values = source[:, at]
        if count is not None:
            row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            kept, values = (a.astype(jnp.float32) for a in (to[:, at], values))
            values = jnp.where(row < count, values, kept).astype(to.dtype)
        to[:, at] = values


def _product(left, right, dimensions):
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _on_lanes(values_1m):
    """Broadcasts one value per row over the 128 lanes, [m, 128]."""
    return jnp.broadcast_to(values_1m, (TPU_LANES, values_1m.shape[1])).T
