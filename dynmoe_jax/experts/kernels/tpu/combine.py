"""Combine (unpermute) on TPU: reads the rows that are used, and no others.

Gathers read K rows for every token, though few tokens have K experts (docs/measurements.md:
v5p-combine-gathers).  But rows stand by expert, and within an expert by token: those of a block of
tokens are one run for each expert.  A program fetches these runs, in pieces that memory is tiled
by, and adds them up as a product with a matrix of zeros and ones, which is exact.  (A row that is
not finite reaches the other tokens of its block; a step that has one is not applied anyway.)

Axis legend: T tokens, K slots per token, E experts, n rows, D model width, b tokens of a block,
r rows of a tile.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dynmoe_jax.hardware.target import TPU_LANES, TPU_TILE_ROWS
from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import COMBINE_BUDGET

NAME = "sum_of_rows"
PIECE = TPU_TILE_ROWS
"""Rows fetched by one copy."""

PIECES = 8
"""Pieces of a tile, 128 rows: what a matrix unit adds up at once."""

BLOCKS = ((256, 8), (256, 4), (256, 2), (256, 1), (128, 1))
"""Tokens of a block, and blocks of one program, best first.  Of smaller blocks, more of what is
fetched belongs to others; larger ones make the product with zeros and ones larger.  In a program
fetching goes on from one block to the next."""

FETCHED_BYTES = 2 * 2**20
"""Bytes of the tiles in flight at a time."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tile sizes of one program.

    Attributes:
      block: b.
      together: blocks of one program.
      ring: tiles in flight at a time.
    """

    block: int
    together: int
    ring: int


def sizes_for(tokens: int, width: int, itemsize: int) -> Sizes | None:
    """Chooses sizes that divide T and fit into VMEM; None if there are none.

    Args:
      tokens: T.
      width: D.
      itemsize: bytes of one number.
    """
    if width % TPU_LANES:
        return None
    tile = PIECE * PIECES * width * itemsize
    ring = max(2, min(8, FETCHED_BYTES // tile))

    def vmem(block, together):
        # Sums and the numbers of rows, two programs at a time; sums of a block in float32.
        moved = 2 * together * block * (width * itemsize + TPU_LANES * 4)
        return moved + ring * tile + 4 * block * width

    divide = ((block, together) for block, together in BLOCKS if tokens % (block * together) == 0)
    sizes = cheapest_tile(divide, vmem, COMBINE_BUDGET)
    return Sizes(*sizes, ring) if sizes else None


def sum_of_rows(
    y_nD: Float[Array, "n D"],
    token_n: Int[Array, "n"],
    group_size_E: Int[Array, "E"],
    row_TK: Int[Array, "T K"],
    sizes: Sizes,
    *,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """Sums the rows of every token, in float32, rounded to their type.

    Args:
      y_nD: rows by expert, and within an expert by token; n is a multiple of 16.
      token_n: their tokens.
      group_size_E: rows of each expert; those beyond them all may hold anything.
      row_TK: the rows of each token; numbers that no row used has count nothing.
      sizes: see :func:`sizes_for`.
      interpret: run the kernel on a CPU, slowly, for tests.
    """
    (tokens, slots), (rows, width) = row_TK.shape, y_nD.shape
    block, together, ring = dataclasses.astuple(sizes)
    experts, blocks = group_size_E.shape[0], tokens // block
    # Runs of a block: their rows, and a piece at either end of each; up to whole tiles.
    most = (block * slots // PIECE + 2 * experts) // PIECES + 1
    fetched_rows = rows + PIECE * experts * blocks
    return pl.pallas_call(
        partial(_kernel, experts=experts, together=together, ring=ring),
        out_shape=jax.ShapeDtypeStruct((tokens, width), y_nD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[
                pl.BlockSpec((together * block, slots), lambda i, first: (i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((together * block, width), lambda i, first: (i, 0)),
            grid=(blocks // together,),
            scratch_shapes=[
                pltpu.VMEM((ring, PIECES * PIECE, width), y_nD.dtype),
                pltpu.VMEM((block, width), jnp.float32),
                pltpu.SMEM((together * most * PIECES,), jnp.int32),
                pltpu.SMEM((together + 1,), jnp.int32),
                pltpu.SemaphoreType.DMA((ring,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * block * width * fetched_rows,
            bytes_accessed=(rows + tokens) * width * y_nD.dtype.itemsize,
            transcendentals=0,
        ),
        name=NAME,
        interpret=interpret,
    )(_runs(token_n, group_size_E, tokens, block), row_TK, y_nD)


def _runs(token_n, group_size_E, tokens: int, block: int) -> Int[Array, "runs"]:
    """First row of every expert from every block on, and where the last block's rows end.

    In one dimension, as scalars are stored best.
    """
    rows, experts = token_n.shape[0], group_size_E.shape[0]
    end_E = jnp.cumsum(group_size_E)
    expert_n = jnp.sum(jnp.arange(rows)[:, None] >= end_E, axis=-1)
    # Ascending, padding last.
    key_n = jnp.where(expert_n < experts, expert_n * tokens + token_n, experts * tokens)
    starts = jnp.arange(0, tokens + 1, block)
    wanted = starts[:, None] + jnp.arange(experts) * tokens
    first = jnp.searchsorted(key_n, wanted.reshape(-1), method="scan_unrolled")
    # Of the last block's end "expert's first token + T" is the next expert's first.
    return jnp.minimum(first, end_E[-1]).astype(jnp.int32)


def _kernel(
    first, row_ref, y_ref, out_ref, fetched, sums, piece_smem, tile_smem, arrived, *, experts,
    together, ring,
):  # fmt: skip
    block = pl.program_id(0) * together
    used = first[first.shape[0] - 1]
    fetched[...] = jnp.zeros_like(fetched)  # where nothing arrives, 0 * NaN must not be added

    def list_block(i, tile):
        tile_smem[i] = tile
        count = _list_pieces(first, piece_smem, block + i, tile * PIECES, experts)
        return count // PIECES

    tiles = jax.lax.fori_loop(0, together, list_block, 0)
    tile_smem[together] = tiles

    def copies(tile):
        for piece in range(PIECES):
            start = piece_smem[tile * PIECES + piece]
            source = y_ref.at[pl.ds(pl.multiple_of(jnp.maximum(start, 0), PIECE), PIECE)]
            slot = tile % ring
            target = fetched.at[slot, pl.ds(piece * PIECE, PIECE)]
            yield start >= 0, pltpu.make_async_copy(source, target, arrived.at[slot])

    def start(tile):
        for exists, copy in copies(tile):
            pl.when(exists)(copy.start)

    def start_if(tile):
        @pl.when(tile < tiles)
        def _():
            start(tile)

    for tile in range(ring - 1):
        start_if(tile)

    def of_block(i, _):
        at = pl.ds(pl.multiple_of(i * sums.shape[0], sums.shape[0]), sums.shape[0])
        row_bK = row_ref[at]
        sums[...] = jnp.zeros_like(sums)

        def add(tile, _):
            start_if(tile + ring - 1)
            for exists, copy in copies(tile):
                pl.when(exists)(copy.wait)
            _add_tile(row_bK, fetched.at[tile % ring], sums, piece_smem, tile, used)
            return 0

        jax.lax.fori_loop(tile_smem[i], tile_smem[i + 1], add, 0)
        out_ref[at] = sums[...].astype(out_ref.dtype)
        return 0

    jax.lax.fori_loop(0, together, of_block, 0)


def _list_pieces(first, piece_smem, block, count, experts):
    """Writes down where the pieces of a block begin, -1 up to a whole tile; how many are listed."""

    def of_expert(expert, listed):
        run, end = (first[(block + i) * experts + expert] for i in range(2))

        def note(piece, count):
            piece_smem[count] = piece * PIECE
            return count + 1

        count, next_piece = listed
        # Small runs share pieces, and what is fetched twice would be added twice.
        begin = jnp.maximum(jax.lax.div(run, PIECE), next_piece)
        stop = jnp.where(end > run, jax.lax.div(end + PIECE - 1, PIECE), begin)
        return jax.lax.fori_loop(begin, stop, note, count), jnp.maximum(stop, next_piece)

    count, _ = jax.lax.fori_loop(0, experts, of_expert, (count, 0))
    whole = jax.lax.div(count + PIECES - 1, PIECES) * PIECES

    def none(at, nothing):
        piece_smem[at] = -1
        return nothing

    jax.lax.fori_loop(count, whole, none, 0)
    return whole


def _add_tile(row_bK, tile_ref, sums, piece_smem, tile, used):
    starts = [piece_smem[tile * PIECES + piece] for piece in range(PIECES)]
    rows = PIECES * PIECE

    def numbers(shape, axis):
        """Number of the row that each position of the tile holds; -1 for none."""
        position = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        piece, found = jax.lax.div(position, PIECE), jnp.full(shape, -1, jnp.int32)
        for i, start in enumerate(starts):
            number = start + position - i * PIECE
            found = jnp.where((piece == i) & (start >= 0) & (number < used), number, found)
        return found

    end = jnp.int32(0)
    for start in starts:
        end = jnp.maximum(end, start + PIECE)

    @pl.when(end > used)
    def _():  # rows beyond those used may hold NaN
        tile_ref[...] = jnp.where(numbers((rows, 1), 0) >= 0, tile_ref[...], 0).astype(
            tile_ref.dtype
        )

    number_1r = numbers((1, rows), 1)
    belongs_br = jnp.zeros((row_bK.shape[0], rows), jnp.bool_)
    for slot in range(row_bK.shape[1]):
        belongs_br |= (row_bK[:, slot : slot + 1] == number_1r) & (number_1r >= 0)
    exact = jax.lax.Precision.HIGHEST if tile_ref.dtype == jnp.float32 else None
    sums[...] += jax.lax.dot_general(
        jnp.where(belongs_br, 1.0, 0.0).astype(tile_ref.dtype),
        tile_ref[...],
        (((1,), (0,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
