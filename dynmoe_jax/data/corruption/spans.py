"""Denoisers: which ids of a piece of text are masked, in how many spans.

A denoiser has a mean span length mu and a density r, the share of ids that are masked.  T5
(arXiv 1910.10683, section 3.1.4) rounds the number r c of masked ids of c, and the number r c / mu
of spans, to the nearest whole one, which for short pieces is another ratio and another length.
Here both are rounded up or down by chance, so that they hold on average for any length at which a
span is expected.

Axis legend: M ids of a piece, S spans.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Denoiser(NamedTuple):
    """A denoiser.

    Attributes:
      span: mu, mean ids of a span; 0: the end of the piece is masked and needs no sentinels
        (prefix language model).
      density: r, the share of ids that are masked.
    """

    span: float
    density: float

    def counts(self, ids: int, chance: tuple[float, float]) -> tuple[int, int]:
        """(masked ids, spans with sentinels) of a piece; neither falls as the piece grows.

        Args:
          ids: of the piece, at least one.
          chance: two numbers from 0 to 1 that decide how the two are rounded.
        """
        masked = min(max(int(ids * self.density + chance[0]), 1), max(ids - 1, 1))
        if not self.span:
            return masked, 0
        spans = int(masked / self.span + chance[1])
        return masked, max(1, min(spans, masked, ids - masked))

    def fitting(self, ids: int, room: int, sentinels: int, chance: tuple[float, float]) -> int:
        """The most ids, at least one, of a piece whose inputs and targets fit into a room.

        Args:
          ids: that there are.
          room: positions; a span needs two besides its ids, for its sentinel in inputs and targets.
          sentinels: spans that a piece can have.
          chance: see :meth:`counts`.
        """
        low, high = 1, min(ids, room)
        while low < high:
            middle = (low + high + 1) // 2
            _, spans = self.counts(middle, chance)
            if middle + 2 * spans <= room and spans <= sentinels:
                low = middle
            else:
                high = middle - 1
        return low


def lengths(total: int, parts: int, draw: np.random.Generator) -> Int[np.ndarray, "S"]:
    """Lengths, at least 1 each, that add up; all ways to choose them are as likely."""
    cuts = np.sort(draw.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else []
    return np.diff([0, *cuts, total])


def masked(
    ids: Int[np.ndarray, "M"],
    denoiser: Denoiser,
    sentinels: Int[np.ndarray, "S"],
    chance: tuple[float, float],
    draw: np.random.Generator,
) -> tuple[Int[np.ndarray, "I"], Int[np.ndarray, "J"]]:
    """(inputs, targets) of a piece: text with a sentinel for each span; sentinels with their spans.

    Args:
      ids: of the piece.
      denoiser: which ids are masked.
      sentinels: at least as many as there are spans; each comes once in the inputs and once in the
        targets, in order.
      chance: see :meth:`Denoiser.counts`.
      draw: of where spans lie.
    """
    count, spans = denoiser.counts(len(ids), chance)
    if not spans:
        return ids[: len(ids) - count], ids[len(ids) - count :]
    hidden_S = lengths(count, spans, draw)
    # A piece begins with text that is kept and ends with a span, as in T5; one id alone is a span.
    kept = len(ids) - count
    kept_S = lengths(kept, spans, draw) if kept else np.zeros(1, np.int64)
    parts = np.split(ids, np.cumsum(np.stack([kept_S, hidden_S], axis=1).reshape(-1))[:-1])
    marks = sentinels[:spans, None]
    inputs = [part for pair in zip(parts[::2], marks, strict=True) for part in pair]
    targets = [part for pair in zip(marks, parts[1::2], strict=True) for part in pair]
    return np.concatenate(inputs), np.concatenate(targets)
