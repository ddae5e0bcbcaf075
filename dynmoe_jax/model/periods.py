"""Runs of a list of layers: repeated periods, each of which is compiled once and scanned."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Run(Generic[Kind]):
    """A period of layers and how often it is repeated.

    Attributes:
      period: the layers that one repetition computes; each is compiled by itself.
      repeats: how often, at least once.
    """

    period: tuple[Kind, ...]
    repeats: int

    @property
    def layers(self) -> tuple[Kind, ...]:
        """All layers of the run."""
        return self.period * self.repeats


def find_runs(layers: Sequence[Kind]) -> tuple[Run[Kind], ...]:
    """Divides layers into runs, with the fewest layers to compile; of such, the fewest runs.

    A dynamic program over the first layer of a run, from the last one back: O(n^3) comparisons of
    two layers at most.

    Args:
      layers: what tells layers from each other; equal ones can share a program.

    Returns:
      runs that, one after another, give the layers back.
    """
    numbers = {layer: number for number, layer in enumerate(layers)}
    same, count = [numbers[layer] for layer in layers], len(layers)
    # Of the layers from i: (layers to compile, runs), and the run that begins there.
    cost: list[tuple[int, int]] = [(0, 0)] * (count + 1)
    first: list[Run[Kind] | None] = [None] * (count + 1)
    for i in reversed(range(count)):
        ways = [
            ((length + cost[end][0], 1 + cost[end][1]), length, (end - i) // length)
            for length in range(1, count - i + 1)
            for end in _ends(same, i, length)
        ]
        # Of equal ways the longest run of the shortest period.
        cost[i], length, repeats = min(ways, key=lambda way: (way[0], way[1], -way[2]))
        first[i] = Run(tuple(layers[i : i + length]), repeats)
    runs, i = [], 0
    while i < count:
        runs.append(first[i])
        i += len(first[i].layers)
    return tuple(runs)


def _ends(same: Sequence[int], start: int, length: int) -> range:
    """Where runs of a period of that length may end; equal numbers are equal layers."""
    end = start + length
    while end < len(same) and same[end] == same[end - length]:
        end += 1
    return range(start + length, end + 1, length)
