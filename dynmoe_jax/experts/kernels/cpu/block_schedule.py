"""Schedule of the blocks of a few static sizes into which an expert's rows are cut.

Shapes are static and loads are data, so a block is computed in one of a handful of sizes, by a
loop whose trip count is data.  A block that is larger than its rows wastes products; an additional
block costs another pass over the expert's weight gradients.  The cheapest cut of every number of
rows is worked out here, once, when the layer is traced.

Axis legend: R rows, E experts, S block sizes, b rows of one block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a block: powers of two, and sizes halfway between where that can save more rows than a
block costs; each size takes time to compile (docs/measurements.md: cpu-block-sizes,
cpu-block-compile)."""

OVERHEAD_ROWS = 48
"""Cost of a block beyond its rows, in rows: mostly for reading weights and adding to their
gradients (docs/measurements.md: cpu-block-overhead)."""

SMALLEST_SHARE = 128
"""Smallest block as a fraction of T: smaller ones would save less than they cost to compile."""

NOWHERE = jnp.iinfo(jnp.int32).max
"""Token of a row of a block beyond those of its expert."""

DECODE_TOKENS = 32
"""Most tokens for which blocks of 1, 2 and 4 rows are used: an expert that one sequence of a few
uses has one or two rows (docs/measurements.md: cpu-small-blocks)."""


def block_sizes(tokens: int) -> tuple[int, ...]:
    """Returns the sizes to use for T tokens, ascending; an expert has no more than T rows."""
    enough = next((size for size in SIZES if size >= tokens), SIZES[-1])
    least = 1 if tokens <= DECODE_TOKENS else max(8, tokens / SMALLEST_SHARE)
    return tuple(s for s in SIZES if s <= enough and (s >= least or s == enough))


@functools.cache
def cheapest_cut(sizes: tuple[int, ...]) -> Int[np.ndarray, "R S"]:
    """Blocks of each size that hold 0, 1, 2, ... rows (below the largest size) at least cost."""
    rows = sizes[-1]
    cost = np.zeros(rows)
    blocks = np.zeros((rows, len(sizes)), np.int32)
    for n in range(1, rows):
        rest = [max(n - size, 0) for size in sizes]
        costs = [size + OVERHEAD_ROWS + cost[r] for size, r in zip(sizes, rest, strict=True)]
        best = int(np.argmin(costs))
        cost[n] = costs[best]
        blocks[n] = blocks[rest[best]]
        blocks[n, best] += 1
    return blocks


class Schedule:
    """Rows of a layer, with room for one block past their end, and the blocks they are cut into."""

    def __init__(
        self,
        token_R: Int[Array, "R"],
        weight_R: Float[Array, "R"],
        group_size_E: Int[Array, "E"],
        tokens: int,
        sizes: tuple[int, ...] | None = None,
    ):
        """Cuts the rows of T tokens.

        Args:
          token_R: token of each row.
          weight_R: combine weight of each row.
          group_size_E: rows of each expert.
          tokens: T.
          sizes: of blocks, ascending; None: :func:`block_sizes`.
        """
        self.sizes = sizes or block_sizes(tokens)
        largest = self.sizes[-1]
        self.token_P = jnp.pad(token_R, (0, largest))
        self.weight_P = jnp.pad(weight_R, (0, largest))
        self.end_E = jnp.cumsum(group_size_E)
        self.start_E = self.end_E - group_size_E
        blocks_ES = jnp.asarray(cheapest_cut(self.sizes))[group_size_E % largest]
        self.blocks_ES = blocks_ES.at[:, -1].add(group_size_E // largest)
        self.used_experts = jnp.sum(group_size_E > 0)
        self.used_E = jnp.argsort(group_size_E == 0, stable=True)

    def fold(self, add_block, carry):
        """Folds ``add_block`` over all blocks, experts and rows in rising order.

        Args:
          add_block: ``(carry, expert, start, token_b, weight_b) -> carry``.  Rows of the block
            that belong to the next expert, or to none, have the token :data:`NOWHERE` and weight
            0: gathers fill in zeros there and scatters write nowhere.  What else a block writes
            past its rows, the next expert overwrites.
          carry: what to start from.
        """

        def one_expert(i, carry):
            e = self.used_E[i]
            state = (self.start_E[e], carry)
            for s, size in reversed(list(enumerate(self.sizes))):
                body = functools.partial(self._one_block, add_block, e, size)
                state = jax.lax.fori_loop(0, self.blocks_ES[e, s], body, state)
            return state[1]

        return jax.lax.fori_loop(0, self.used_experts, one_expert, carry)

    def _one_block(self, add_block, e, size, _, state):
        start, carry = state
        token_b = jax.lax.dynamic_slice(self.token_P, (start,), (size,))
        weight_b = jax.lax.dynamic_slice(self.weight_P, (start,), (size,))
        inside_b = start + jnp.arange(size) < self.end_E[e]
        token_b = jnp.where(inside_b, token_b, NOWHERE)
        weight_b = jnp.where(inside_b, weight_b, 0.0)
        return start + size, add_block(carry, e, start, token_b, weight_b)
