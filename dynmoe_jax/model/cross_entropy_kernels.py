"""The kernels of the cross-entropy on TPU: logits that never leave fast memory.

:func:`logit_sums` goes through the tiles of the vocabulary for each tile of tokens, and keeps what
a loss is made of.  :func:`logit_gradients` computes the logits a second time, which takes less time
than to write them in float32 and to read them back, and makes their gradient.  It adds up the
gradient of the output projection in fast memory, and writes the gradients of a chunk's logits in
the compute type, for the product with the output projection, which XLA computes.

A tile is worked on in pieces of 256 columns, so that the matrix units have the next piece while the
vector units have this one.  Maxima and sums are kept for each lane by itself, and the lanes are put
together once, when the vocabulary is done.

Axis legend: T tokens, C tokens of one chunk, D model width, V vocabulary (of this device), t tokens
and v columns of a tile, P the 128 lanes of a register.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.accounting import ALLOWED_SHARE, COUNTED_SHARE, vmem_bytes
from dynmoe_jax.target import TPU_LANES, current_target

TOKENS = (1024, 512, 256, 128)
"""Of a tile, best first: :func:`logit_sums` reads the output projection once for each."""

GRADIENT_TOKENS = 512
"""The most of a tile of :func:`logit_gradients`, whose program is twice as long."""

COLUMNS = (1280, 1024, 768, 512, 256)
"""Of a tile, best first: :func:`logit_gradients` reads all tokens once for each."""

PIECE = 256
"""Columns whose logits are made at a time: the width of the matrix units of v6e."""

CHUNKS = 4
"""Of ``chunk_tokens`` that the kernels take at a time: the gradients of their logits alone, in
bfloat16, are less than what a chunk of logits takes without kernels (float32, and three arrays)."""

MASKED = -1e30
"""A logit behind the end of the vocabulary; finite, so that no difference is NaN."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the kernels cut their work.

    Attributes:
      tokens: of a tile.
      columns: of a tile; the last tile may reach beyond the vocabulary.
      chunk: tokens whose gradients of logits exist at one time, a multiple of ``tokens``.
    """

    tokens: int
    columns: int
    chunk: int


def cross_entropy_tiles(
    tokens: int, width: int, vocabulary: int, chunk_tokens: int, dtype: jnp.dtype
) -> Tiles | None:
    """The tiles on the current target; None if it is no TPU, or nothing fits.

    The compute type has to be bfloat16 (products in float32 are six, and the programs as long), the
    width a multiple of 128, and the vocabulary at least one tile; no tile has to divide it.

    Args:
      tokens: T of one device; any number, the last tile is filled up.
      width: D.
      vocabulary: V of one device.
      chunk_tokens: ``config.loss.chunk_tokens``.
      dtype: the compute type.
    """
    target = current_target()
    if target.platform != "tpu" or dtype != jnp.bfloat16 or width % TPU_LANES:
        return None
    allowed = COUNTED_SHARE * vmem_bytes(target)
    fits = (
        (tile, columns)
        for tile in TOKENS
        for columns in COLUMNS
        if tile < 2 * tokens or tile == TOKENS[-1]
        if columns <= vocabulary and _fast_memory(tile, width, columns) <= allowed
    )
    tile, columns = next(fits, (0, 0))
    if not tile:
        return None
    chunks = -(-tokens // (CHUNKS * chunk_tokens))
    return Tiles(tile, columns, -(-tokens // (chunks * tile)) * tile)


def _fast_memory(tile: int, width: int, columns: int) -> int:
    """Bytes that :func:`logit_gradients` uses; :func:`logit_sums` uses less."""
    wide, tile = jnp.dtype(jnp.bfloat16).itemsize, min(tile, GRADIENT_TOKENS)
    # Two tiles of tokens, of the output projection, of its gradient twice, and of the logits'
    # gradients, of two programs; what there is of a token, on all lanes; four pieces of arithmetic.
    moved = wide * (2 * tile * width + columns * width + tile * columns) + 2 * 4 * columns * width
    return 2 * moved + 4 * tile * (4 * TPU_LANES + 4 * PIECE)


def logit_sums(
    tiles: Tiles,
    x_TD: Float[Array, "T D"],
    output_DV: Float[Array, "D V"],
    targets_T: Int[Array, "T"],
    interpret: bool = False,
) -> Float[Array, "3 T"]:
    """The largest logit, the sum of exponentials of the differences from it, the target's logit.

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

        for piece, logits_tv in _pieces(x_ref, output_ref):
            most, sums, hit = most_tP[...], sum_tP[...], hit_tP[...]
            parts = []
            for at in range(0, PIECE, TPU_LANES):
                first = j * tiles.columns + piece + at
                logits_tP = logits_tv[:, at : at + TPU_LANES]
                if V % tiles.columns:
                    lane_tP = jax.lax.broadcasted_iota(jnp.int32, logits_tP.shape, 1)
                    logits_tP = jnp.where(lane_tP < V - first, logits_tP, MASKED)
                hit = jnp.where(column_tP[...] == first, logits_tP, hit)
                parts.append(logits_tP)
            for logits_tP in parts:
                most = jnp.maximum(most, logits_tP)
            sums *= jnp.exp(most_tP[...] - most)
            for logits_tP in parts:
                sums += jnp.exp(logits_tP - most)
            most_tP[...], sum_tP[...], hit_tP[...] = most, sums, hit

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
    x_DT = x_TD.T
    rows_2T = jnp.stack([log_z_T, scale_T])

    def of_chunk(doutput_DV, chunk):
        first = (chunk * (tiles.chunk // min(tiles.tokens, GRADIENT_TOKENS)))[None]
        operands = first, x_TD, x_DT, output_DV, targets_T[None], rows_2T, doutput_DV
        dlogits_CV, doutput_DV = _gradients_of_chunk(tiles, operands, interpret)
        dx_CD = jnp.einsum("cv,dv->cd", dlogits_CV, output_DV)
        return doutput_DV, dx_CD

    start = jnp.zeros(output_DV.shape, jnp.float32)
    chunks = jnp.arange(len(x_TD) // tiles.chunk)
    doutput_DV, dx_NCD = jax.lax.scan(of_chunk, start, chunks)
    return dx_NCD.reshape(x_TD.shape), doutput_DV


def _gradients_of_chunk(tiles: Tiles, operands, interpret: bool) -> tuple[Array, Array]:
    """(gradients of a chunk's logits, that of the output projection with those of before)."""
    _, x_TD, _, output_DV, *_ = operands
    (D, V), tile, columns = output_DV.shape, min(tiles.tokens, GRADIENT_TOKENS), tiles.columns

    def of_tile(
        first, x_ref, x_Dt_ref, output_ref, target_ref, rows_ref, before_ref, dlogits_ref, sum_ref
    ):
        @pl.when(pl.program_id(1) == 0)
        def _():
            sum_ref[...] = before_ref[...]

        column_tP = _from_lane(target_ref[...]) - pl.program_id(0) * columns
        log_z_tP, scale_tP = (_on_lanes(rows_ref[row : row + 1]) for row in range(2))
        for piece, logits_tv in _pieces(x_ref, output_ref):
            for at in range(0, PIECE, TPU_LANES):
                odds_tP = jnp.exp(logits_tv[:, at : at + TPU_LANES] - log_z_tP) * scale_tP
                dlogits_tP = jnp.where(column_tP == piece + at, odds_tP - 1, odds_tP)
                span = pl.ds(piece + at, TPU_LANES)
                dlogits_ref[:, span] = dlogits_tP.astype(dlogits_ref.dtype)
            span = pl.ds(piece, PIECE)
            # Columns behind the end of the vocabulary may hold anything: none is written.
            sum_ref[:, span] += _product(x_Dt_ref[...], dlogits_ref[:, span])

    sums = pl.BlockSpec((D, columns), lambda j, i, first: (0, j))
    outputs = [
        jax.ShapeDtypeStruct((tiles.chunk, V), x_TD.dtype),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
    ]
    steps = -(-V // columns)
    tokens_bytes = 2 * tiles.chunk * D * x_TD.dtype.itemsize
    return pl.pallas_call(
        of_tile,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, tiles.chunk // tile),
            in_specs=[
                pl.BlockSpec((tile, D), lambda j, i, first: (first[0] + i, 0)),
                pl.BlockSpec((D, tile), lambda j, i, first: (0, first[0] + i)),
                sums,
                pl.BlockSpec((1, tile), lambda j, i, first: (0, first[0] + i)),
                pl.BlockSpec((2, tile), lambda j, i, first: (0, first[0] + i)),
                sums,
            ],
            out_specs=[pl.BlockSpec((tile, columns), lambda j, i, first: (i, j)), sums],
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
    """(first column of a piece of the tile, its logits in float32)."""
    for piece in range(0, output_ref.shape[1], PIECE):
        yield piece, _product(x_ref[...], output_ref[:, piece : piece + PIECE])


def _on_lanes(row_1t: Array) -> Array:
    """What there is of a token, on all lanes."""
    return jnp.broadcast_to(row_1t, (TPU_LANES, row_1t.shape[1])).T


def _from_lane(target_1t: Array) -> Array:
    """Where 128 columns have to begin for a token's target to be in this lane."""
    target_tP = _on_lanes(target_1t)
    return target_tP - jax.lax.broadcasted_iota(jnp.int32, target_tP.shape, 1)


def _product(left, right):
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=int(ALLOWED_SHARE * vmem_bytes(current_target())),
    )


def _bytes(array) -> int:
    return array.size * array.dtype.itemsize
