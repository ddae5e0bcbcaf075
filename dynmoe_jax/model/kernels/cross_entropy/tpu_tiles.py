"""Tile sizes of the kernels of the cross-entropy (:mod:`.tpu`).

Axis legend: T tokens, D model width, V vocabulary.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp

from dynmoe_jax.hardware.target import TPU_LANES, current_target
from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import tile_budget, vmem_bytes

TOKENS = (1024, 512, 256, 128)
"""Tokens of a tile, best first: ``logit_sums`` reads the output projection once for each."""

GRADIENT_TOKENS = 512
"""Most tokens of a tile of ``logit_gradients``, whose program is twice as long."""

COLUMNS = (1280, 1024, 768, 512, 256)
"""Columns of a tile, best first: ``logit_gradients`` reads all tokens once for each."""

PIECE = 256
"""Columns whose logits are made at a time: the width of the matrix units of v6e."""

ROWS = 128
"""Rows (tokens) of a piece."""

CHUNKS = 4
"""Multiple of ``chunk_tokens`` that the kernels take at a time: the gradients of their logits
alone, in bfloat16, are less than what a chunk of logits takes without kernels (float32, and three
arrays)."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of the kernels.

    Attributes:
      tokens: of a tile.
      columns: of a tile; the last tile may reach beyond the vocabulary.
      chunk: tokens whose gradients of logits exist at one time, a multiple of ``tokens``.
    """

    tokens: int
    columns: int
    chunk: int

    @property
    def gradient_tokens(self) -> int:
        """Tokens of a tile of ``logit_gradients``."""
        return min(self.tokens, GRADIENT_TOKENS)


def cross_entropy_tiles(
    tokens: int, width: int, vocabulary: int, chunk_tokens: int, dtype: jnp.dtype
) -> Tiles | None:
    """Chooses the tiles on the current target; None if it is no TPU, or nothing fits.

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
    most = CHUNKS * chunk_tokens
    candidates = (
        (tile, columns)
        for tile in TOKENS
        for columns in COLUMNS
        if tile <= min(2 * tokens, most) or tile == TOKENS[-1]
        if columns <= vocabulary
    )
    held_bytes = partial(_vmem_of_gradients, width)
    found = cheapest_tile(candidates, held_bytes, tile_budget(vmem_bytes(target)))
    if found is None:
        return None
    tile, columns = found
    chunks = -(-tokens // max(tile, most // tile * tile))
    return Tiles(tile, columns, -(-tokens // (chunks * tile)) * tile)


def _vmem_of_gradients(width: int, tile: int, columns: int) -> int:
    """Bytes that ``logit_gradients`` uses; ``logit_sums`` uses less."""
    wide, tile = jnp.dtype(jnp.bfloat16).itemsize, min(tile, GRADIENT_TOKENS)
    # Tiles of tokens, output projection and logits' gradients; of its gradient, that of before and
    # this one; all of these of two programs.  Tokens as columns; what there is of a token, on all
    # lanes; two pieces of logits of all rows, and as much arithmetic.
    moved = wide * (tile * width + columns * width + tile * columns) + 2 * 4 * columns * width
    return 2 * moved + wide * tile * width + 4 * tile * (3 * TPU_LANES + 4 * PIECE)
