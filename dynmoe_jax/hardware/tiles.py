"""Choice of a kernel's tile: among those that fit into a memory budget, the one of least cost."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Tile = TypeVar("Tile", bound=tuple)


def cheapest_tile(
    candidates: Iterable[Tile],
    held_bytes: Callable[..., float],
    budget: float,
    cost: Callable[..., object] | None = None,
) -> Tile | None:
    """Returns the cheapest tile that fits, the earlier one of equals; None if none fits.

    Args:
      candidates: sizes of tiles.
      held_bytes: (\\*sizes) -> bytes that a program of such tiles holds at a time.
      budget: how many it may hold.
      cost: (\\*sizes) -> anything that compares; None: candidates stand cheapest first.
    """
    fits = (tile for tile in candidates if held_bytes(*tile) <= budget)
    return next(fits, None) if cost is None else min(fits, key=lambda t: cost(*t), default=None)
