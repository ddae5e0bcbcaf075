"""A copy of the state, to be written while the next steps change the state itself."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


class Snapshot:
    """Copies a state into memory that is kept from one time to the next.

    Without a copy, Orbax holds the arrays of a CPU as they are, the next step cannot reuse their
    memory, and to take other memory costs it more time than the copy, which costs least if it has
    its memory already (docs/measurements.md: save-held-arrays, save-copy).
    """

    def __init__(self):
        self._last: Any = None

    def of(self, state: Any) -> Any:
        """A copy, placed alike; the one before it is gone then.

        Args:
          state: a tree of arrays; of other shapes than the last time where a model has grown.
        """
        placed = jax.tree.map(lambda x: x.sharding, state)
        last, self._last = self._last, None
        if last is None or _shapes(last) != _shapes(state):
            del last  # before there is other memory
            last = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=placed)(state)
        copy = jax.jit(_first, donate_argnums=1, keep_unused=True, out_shardings=placed)
        self._last = copy(state, last)
        return self._last


def _shapes(state: Any) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in jax.tree.leaves(state)]


def _first(state: Any, last: Any) -> Any:
    del last  # the copy is written to its memory
    return jax.tree.map(jnp.copy, state)
