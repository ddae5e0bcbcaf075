"""Virtual shards in turn: one sequence of rows, whoever reads it and however many they are.

Row n of the endless stream is the next row of shard n % S.  A host that owns some of the shards
produces exactly their rows, in order; the state is kept per shard, so the states of all hosts,
put together, can be dealt out again to another number of hosts.
"""

from collections.abc import Mapping
from typing import Any

import grain


class RowsInTurn(grain.IterDataset):
    """The rows of some of the ``num_shards`` shards, in the order of the whole stream.

    Args:
      shards: the endless dataset of each shard that is read here, by its number.
      num_shards: how many there are in all.
    """

    def __init__(self, shards: Mapping[int, grain.IterDataset], num_shards: int):
        self._shards = dict(sorted(shards.items()))
        self._num_shards = num_shards
        super().__init__(list(self._shards.values()))

    def __iter__(self) -> grain.DatasetIterator:
        iterators = {number: iter(dataset) for number, dataset in self._shards.items()}
        return _RowsInTurnIterator(iterators, self._num_shards)


class _RowsInTurnIterator(grain.DatasetIterator):
    def __init__(self, shards: Mapping[int, grain.DatasetIterator], num_shards: int):
        super().__init__(list(shards.values()))
        self._shards = shards
        self._num_shards = num_shards
        self._row = 0  # of the whole stream

    def __next__(self) -> dict:
        while self._row % self._num_shards not in self._shards:
            self._row += 1
        row = next(self._shards[self._row % self._num_shards])
        self._row += 1
        return row

    def get_state(self) -> dict[str, Any]:
        """The next row of the whole stream, and the state of each shard that is read here."""
        # Names, not numbers, because JSON turns numbers into names.
        shards = {str(number): shard.get_state() for number, shard in self._shards.items()}
        return {"row": self._row, "shards": shards}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state, also one that has been through JSON."""
        self._row = state["row"]
        for number, shard in self._shards.items():
            shard.set_state(_with_tuples(state["shards"][str(number)]))


def _with_tuples(state: Any) -> Any:
    """The state with lists as tuples.

    Grain's packing compares the slices in its state with tuples; a state that has been through
    JSON has lists in their place, and would silently drop the rest of a document.
    """
    if isinstance(state, Mapping):
        return {name: _with_tuples(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return tuple(_with_tuples(value) for value in state)
    return state
