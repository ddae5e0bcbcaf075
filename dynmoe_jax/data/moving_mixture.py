"""Rows of the domains of one virtual shard, in shares that may move, corrupted at first or not.

The next row is of the domain whose credit is largest: each row gives every domain its weight and
takes 1 from the domain that it is of (smooth weighted round robin).  Credits add up to 0 and stay
bounded, so the shares hold over any stretch, also when weights change in the middle.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from dynmoe_jax.data.corruption.corruption import LEARNED, Corrupt
from dynmoe_jax.data.corruption.rows import LATER
from dynmoe_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Moving:
    """All that changes while a stream is read.

    Attributes:
      corrupt: what text is turned into at first; None: nothing.
      corrupted: rows of the whole stream before text comes as it is; 0: never.
      refusal: sentence for a position that other rows would have been corrupted before.
    """

    corrupt: Corrupt | None = None
    corrupted: int = 0
    refusal: str = ""

    def corrupted_rows(self, shard: int, num_shards: int) -> int | None:
        """How many of a shard's rows are corrupted, which are every so many of the stream's; None
        for all."""
        return -((shard - self.corrupted) // num_shards) if self.corrupted else None


class DomainRows(NamedTuple):
    """The rows of one domain.

    Attributes:
      plain: (number of the first document) -> rows of text as it is.
      corrupted: rows of corrupted text, from the first document on; None where none are wanted.
    """

    plain: Callable[[int], grain.IterDataset]
    corrupted: grain.IterDataset | None = None


class MovingMixture(grain.IterDataset):
    """Rows of all domains.

    Args:
      domains: rows of each.
      weights: shares of the rows, which add up to 1, until a state brings others.
      corrupted_rows: how many rows are corrupted before text comes as it is; None for all.
      phase: picks of domains that are skipped, so that shards that are read in turn are not all at
        the same domain.
      refusal: sentence for a state that was taken with other ``corrupted_rows`` and cannot go on.
    """

    def __init__(
        self,
        domains: Mapping[str, DomainRows],
        weights: Mapping[str, float],
        corrupted_rows: int | None = None,
        phase: int = 0,
        refusal: str = "",
    ):
        super().__init__()
        self.domains, self.weights = dict(domains), dict(weights)
        self.corrupted_rows, self.phase, self.refusal = corrupted_rows, phase, refusal

    def __iter__(self) -> grain.DatasetIterator:
        return _MovingMixtureIterator(self)


class _MovingMixtureIterator(grain.DatasetIterator):
    def __init__(self, mixture: MovingMixture):
        super().__init__()
        self._mixture, self._weights = mixture, dict(mixture.weights)
        self._streams = {name: _DomainIterator(rows) for name, rows in mixture.domains.items()}
        self._credit, self._row = dict.fromkeys(self._weights, 0.0), 0
        for _ in range(mixture.phase):
            self._pick()

    def __next__(self) -> dict[str, np.ndarray]:
        corrupts = self._row < self._corrupted(self._row + 1)
        row = self._streams[self._pick()].take(corrupts)
        self._row += 1
        return row

    def _pick(self) -> str:
        for name, weight in self._weights.items():
            self._credit[name] += weight
        # In the order of the domains, whatever order a file has brought them into.
        picked = max(self._streams, key=self._credit.__getitem__)
        self._credit[picked] -= 1
        return picked

    def _corrupted(self, rows: int) -> int:
        """How many of so many rows are corrupted."""
        wanted = self._mixture.corrupted_rows
        if all(domain.corrupted is None for domain in self._mixture.domains.values()):
            return 0
        return rows if wanted is None else min(rows, wanted)

    def get_state(self) -> dict[str, Any]:
        """Weights, credits and the state of each domain; how many rows there were of what kind."""
        return {
            "row": self._row,
            "corrupted": self._corrupted(self._row),
            "weights": dict(self._weights),
            "credit": dict(self._credit),
            "domains": {name: stream.get_state() for name, stream in self._streams.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state.

        Raises:
          DataError: other rows would have been corrupted before it.
        """
        if self._corrupted(state["row"]) != state["corrupted"]:
            raise DataError(self._mixture.refusal)
        self._row = state["row"]
        self._weights, self._credit = dict(state["weights"]), dict(state["credit"])
        for name, stream in self._streams.items():
            stream.set_state(state["domains"][name])


class _DomainIterator:
    """Rows of a domain: corrupted ones, then plain ones of the documents behind them.

    Rows that were shuffled with the last corrupted ones, and were not asked for, are left out.
    """

    def __init__(self, rows: DomainRows):
        self._rows, self._tells_learned = rows, rows.corrupted is not None
        self._document = 0
        self._corrupted = None if rows.corrupted is None else iter(rows.corrupted)
        self._plain: grain.DatasetIterator | None = None

    def take(self, corrupts: bool) -> dict[str, np.ndarray]:
        """The next row, corrupted or plain; after a plain one no other is corrupted."""
        if corrupts:
            row = dict(next(self._corrupted))
            self._document = max(self._document, int(row.pop(LATER)))
            return row
        if self._plain is None:
            self._plain, self._corrupted = iter(self._rows.plain(self._document)), None
        row = next(self._plain)
        if self._tells_learned:
            row = row | {LEARNED: (row["segment_ids"] > 0).astype(np.int32)}
        return row

    def get_state(self) -> dict[str, Any]:
        """The document that plain text begins with, and the state of what is being read."""
        plain, corrupted = self._plain, self._corrupted
        return {
            "document": self._document,
            "plain": None if plain is None else plain.get_state(),
            "corrupted": None if corrupted is None else corrupted.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state, also back to corrupted rows."""
        self._document = state["document"]
        self._plain = self._corrupted = None
        if state["plain"] is not None:
            self._plain = iter(self._rows.plain(self._document))
            self._plain.set_state(state["plain"])
        if state["corrupted"] is not None:
            self._corrupted = iter(self._rows.corrupted)
            self._corrupted.set_state(state["corrupted"])
