"""Kernels of the cross-entropy on TPU: logits that never leave VMEM.

:func:`logit_sums` goes through the tiles of the vocabulary for each tile of tokens, and keeps what
a loss is made of.  :func:`logit_gradients` computes the logits a second time, which takes less time
than to write them in float32 and to read them back, and makes their gradient.  It adds up the
gradient of the output projection in VMEM, and writes the gradients of a chunk's logits in
the compute type, for the product with the output projection, which XLA computes.

A tile is worked on in pieces, so that the matrix units make the logits of the next piece while the
vector units have those of this one: the matrix units seldom wait (docs/measurements.md:
v6e-cross-entropy).  Maxima and sums are kept for each lane by itself, and the lanes are put
together once, when the vocabulary is done.

Axis legend: T tokens, C tokens of one chunk, D model width, V vocabulary (of this device), t tokens
and v columns of a tile, r rows of a piece, P the 128 lanes of a register.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dynmoe_jax.hardware.target import TPU_LANES, current_target
from dynmoe_jax.hardware.vmem import kernel_limit, vmem_bytes
from dynmoe_jax.model.kernels.cross_entropy.tpu_tiles import PIECE, ROWS, Tiles

MASKED = -1e30
"""A logit behind the end of the vocabulary; finite, so that no difference is NaN."""


def logit_sums(
    tiles: Tiles,
    x_TD: Float[Array, "T D"],
    output_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    interpret: bool = False,
) -> Float[Array, "3 T"]:
    """Largest logit, the sum of exponentials of the differences from it, the target's logit.

    Args:
      tiles: how to cut.
      x_TD: the normed residual stream; T is a multiple of the tile.
      output_DV: the output projection, in the type of the stream.
      targets_T: columns; -1: the target is not here, and its logit is 0.
      interpret: runs the kernel on a CPU, for tests.
    """
    (T, D), V, tile = x_TD.shape, output_DV.shape[1], tiles.tokens
    steps = -(-V // tiles.columns)

    def of_tile(x_ref, output_ref, target_ref, sums_ref, most_tP, sum_tP, hit_tP, column_tP):
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _():
            most_tP[...] = jnp.full_like(most_tP, MASKED)
            sum_tP[...] = jnp.zeros_like(sum_tP)
            hit_tP[...] = jnp.zeros_like(hit_tP)
            column_tP[...] = _from_lane(target_ref[...])

        for rows, piece, logits_rv in _pieces(x_ref, output_ref):
            hit_rP, parts = hit_tP[rows], []
            for at in range(0, PIECE, TPU_LANES):
                first = j * tiles.columns + piece + at
                logits_rP = logits_rv[:, at : at + TPU_LANES]
                if V % tiles.columns:
                    lane_rP = jax.lax.broadcasted_iota(jnp.int32, logits_rP.shape, 1)
                    logits_rP = jnp.where(lane_rP < V - first, logits_rP, MASKED)
                hit_rP = jnp.where(column_tP[rows] == first, logits_rP, hit_rP)
                parts.append(logits_rP)
            most_rP = functools.reduce(jnp.maximum, parts, most_tP[rows])
            sum_rP = sum_tP[rows] * jnp.exp(most_tP[rows] - most_rP)
            sum_tP[rows] = sum_rP + sum(jnp.exp(logits_rP - most_rP) for logits_rP in parts)
            most_tP[rows], hit_tP[rows] = most_rP, hit_rP

        @pl.when(j == steps - 1)
        def _():
            most_Pt = most_tP[...].T
            most_1t = jnp.max(most_Pt, axis=0, keepdims=True)
            sums_ref[0:1] = most_1t
            sums_ref[1:2] = jnp.sum(
                sum_tP[...].T * jnp.exp(most_Pt - most_1t), axis=0, keepdims=True
            )
            sums_ref[2:3] = jnp.sum(hit_tP[...].T, axis=0, keepdims=True)

    lanes = (tile, TPU_LANES)
    return pl.pallas_call(
        of_tile,
        grid=(T // tile, steps),
        in_specs=[
            pl.BlockSpec((tile, D), lambda i, j: (i, 0)),
            pl.BlockSpec((D, tiles.columns), lambda i, j: (0, j)),
            pl.BlockSpec((1, tile), lambda i, j: (0, i)),
        ],
        out_specs=pl.BlockSpec((3, tile), lambda i, j: (0, i)),
        out_shape=jax.ShapeDtypeStruct((3, T), jnp.float32),
        scratch_shapes=[
            *(pltpu.VMEM(lanes, jnp.float32) for _ in range(3)),
            pltpu.VMEM(lanes, jnp.int32),
        ],
        compiler_params=_parameters(),
        cost_estimate=pl.CostEstimate(
            flops=2 * T * D * V,
            transcendentals=T * V,
            bytes_accessed=_bytes(x_TD) + T // tile * _bytes(output_DV) + 4 * 4 * T,
        ),
        name="logit_sums",
        interpret=interpret,
    )(x_TD, output_DV, targets_T[None])


def logit_gradients(
    tiles: Tiles,
    x_TD: Float[Array, "T D"],
    output_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    log_z_T: Float[Array, "T"],
    scale_T: Float[Array, "T"],
    interpret: bool = False,
) -> tuple[Float[Array, "T D"], Float[Array, "D V"]]:
    """Gradients of tokens and output projection, where that of the logits is scale * p - hit.

    Args:
      tiles: how to cut; T is a multiple of the chunk.
      x_TD: the normed residual stream; zeros where nothing counts.
      output_DV: the output projection, in the type of the stream.
      targets_T: columns; -1: none is hit.
      log_z_T: logarithm of the sum of exponentials.
      scale_T: of the softmax.
      interpret: runs the kernel on a CPU, for tests.

    Returns:
      gradients, of x in its own type and of the output projection in float32.
    """
    rows_2T = jnp.stack([log_z_T, scale_T])

    def of_chunk(doutput_DV, chunk):
        first = (chunk * (tiles.chunk // tiles.gradient_tokens))[None]
        operands = first, x_TD, output_DV, targets_T[None], rows_2T, doutput_DV
        dlogits_CV, doutput_DV = _gradients_of_chunk(tiles, operands, interpret)
        dx_CD = jnp.einsum("cv,dv->cd", dlogits_CV, output_DV)
        return doutput_DV, dx_CD

    # The first chunk takes zeros instead.
    start = jax.lax.empty(output_DV.shape, jnp.float32)
    chunks = jnp.arange(len(x_TD) // tiles.chunk)
    doutput_DV, dx_NCD = jax.lax.scan(of_chunk, start, chunks)
    return dx_NCD.reshape(x_TD.shape), doutput_DV


def _gradients_of_chunk(tiles: Tiles, operands, interpret: bool) -> tuple[Array, Array]:
    """(gradients of a chunk's logits, that of the output projection with those of before)."""
    _, x_TD, output_DV, *_ = operands
    (D, V), tile, columns = output_DV.shape, tiles.gradient_tokens, tiles.columns

    def of_tile(
        first, x_ref, output_ref, target_ref, rows_ref, before_ref, dlogits_ref, sum_ref, x_Dt
    ):
        @pl.when(pl.program_id(1) == 0)
        def _():
            sum_ref[...] = jnp.where(first[0] == 0, 0.0, before_ref[...])

        x_Dt[...] = x_ref[...].T
        column_tP = _from_lane(target_ref[...]) - pl.program_id(0) * columns
        log_z_tP, scale_tP = (_on_lanes(rows_ref[row : row + 1]) for row in range(2))
        for rows, piece, logits_rv in _pieces(x_ref, output_ref):
            for at in range(0, PIECE, TPU_LANES):
                logits_rP = logits_rv[:, at : at + TPU_LANES]
                odds_rP = jnp.exp(logits_rP - log_z_tP[rows]) * scale_tP[rows]
                dlogits_rP = jnp.where(column_tP[rows] == piece + at, odds_rP - 1, odds_rP)
                span = pl.ds(piece + at, TPU_LANES)
                dlogits_ref[rows, span] = dlogits_rP.astype(dlogits_ref.dtype)
            if rows.stop == tile:
                span = pl.ds(piece, PIECE)
                # Columns behind the end of the vocabulary may hold anything: none is written.
                sum_ref[:, span] += _product(x_Dt[...], dlogits_ref[:, span])

    sums = pl.BlockSpec((D, columns), lambda j, i, first: (0, j))
    outputs = [
        jax.ShapeDtypeStruct((tiles.chunk, V), x_TD.dtype),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
    ]
    steps = -(-V // columns)
    tokens_bytes = tiles.chunk * D * x_TD.dtype.itemsize
    return pl.pallas_call(
        of_tile,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, tiles.chunk // tile),
            in_specs=[
                pl.BlockSpec((tile, D), lambda j, i, first: (first[0] + i, 0)),
                sums,
                pl.BlockSpec((1, tile), lambda j, i, first: (0, first[0] + i)),
                pl.BlockSpec((2, tile), lambda j, i, first: (0, first[0] + i)),
                sums,
            ],
            out_specs=[pl.BlockSpec((tile, columns), lambda j, i, first: (i, j)), sums],
            scratch_shapes=[pltpu.VMEM((D, tile), x_TD.dtype)],
        ),
        out_shape=outputs,
        input_output_aliases={len(operands) - 1: 1},
        compiler_params=_parameters(),
        cost_estimate=pl.CostEstimate(
            flops=4 * tiles.chunk * D * V,
            transcendentals=tiles.chunk * V,
            bytes_accessed=steps * tokens_bytes
            + sum(map(_bytes, (output_DV, *outputs, outputs[1]))),
        ),
        name="logit_gradients",
        interpret=interpret,
    )(*operands)


def _pieces(x_ref, output_ref):
    """(rows, first column, logits in float32) of the pieces, all rows of a column together."""
    blocks = [slice(at, at + ROWS) for at in range(0, x_ref.shape[0], ROWS)]
    columns = output_ref.shape[1]

    def product(rows, piece):
        return _product(x_ref[rows], output_ref[:, pl.ds(piece, PIECE)])

    made = [product(rows, 0) for rows in blocks]
    for piece in range(0, columns, PIECE):
        for block, rows in enumerate(blocks):
            logits_rv, following = made[block], piece + PIECE
            if following < columns:
                made[block] = product(rows, following)
            yield rows, piece, logits_rv


def _on_lanes(row_1t: Array) -> Array:
    """Broadcasts a per-token value over the 128 lanes."""
    return jnp.broadcast_to(row_1t, (TPU_LANES, row_1t.shape[1])).T


def _from_lane(target_1t: Array) -> Array:
    """Column at which 128 columns begin that hold a token's target in this lane."""
    target_tP = _on_lanes(target_1t)
    return target_tP - jax.lax.broadcasted_iota(jnp.int32, target_tP.shape, 1)


def _product(left, right):
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=kernel_limit(vmem_bytes(current_target())),
    )


def _bytes(array) -> int:
    return array.size * array.dtype.itemsize
