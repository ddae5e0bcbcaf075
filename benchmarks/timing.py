"""Interleaved timing, and ratios that carry their spread.

On a machine that other work shares, absolute times drift by tens of percent within a minute.  So
every round runs each case once, and two cases are compared by what they took in the same rounds.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

SLOW = 8.0
SLOW_ROUNDS = 2
PAUSE_S = 0.01


def interleave(
    cases: Mapping[str, Callable[[], float]],
    rounds: int,
    on_round: Callable[[int], None] = lambda done: None,
    in_a_row: int = 1,
) -> dict[str, Float[np.ndarray, "rounds"]]:
    """Seconds of each case in each round, after one round to warm up.

    Each round starts one case later than the round before, so that no case always follows the
    same other one.

    Args:
      cases: each runs once and returns the seconds that it took.  Cases whose names are the same
        after the first ``/`` do the same work.
      rounds: rounds that count.  A case ``SLOW`` times slower in the warm-up than the fastest of
        the same work runs in the first ``SLOW_ROUNDS`` alone; the rest of its rounds are NaN.
      on_round: told the number of rounds done.
      in_a_row: how often a case runs at its turn; the last one counts.  The first has to get its
        memory back from the machine, which a step that follows another one need not
        (docs/measurements.md: cpu-first-step).
    """
    warmup = {name: run() for name, run in cases.items()}
    fastest = {}
    for name, taken in warmup.items():
        fastest[_work(name)] = min(taken, fastest.get(_work(name), taken))
    slow = {name for name, taken in warmup.items() if taken > SLOW * fastest[_work(name)]}
    seconds = {name: np.full(rounds, np.nan) for name in cases}
    order = list(cases)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            if i < SLOW_ROUNDS or name not in slow:
                # Worker threads of the case before (OpenMP, Eigen) spin a little before they sleep.
                time.sleep(PAUSE_S)
                seconds[name][i] = [cases[name]() for _ in range(in_a_row)][-1]
        on_round(i + 1)
    return seconds


def _work(name: str) -> str:
    """What a case does, without how: ``top_2/train`` of ``ours/top_2/train``."""
    return name.partition("/")[2]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One case over another: ratio of medians, and the quartiles of the ratios within rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(over: Float[np.ndarray, "rounds"], under: Float[np.ndarray, "rounds"]) -> Ratio:
    """``over / under``, from the rounds in which both ran."""
    both = np.isfinite(over) & np.isfinite(under)
    over, under = over[both], under[both]
    low, high = np.percentile(over / under, [25, 75])
    return Ratio(float(np.median(over) / np.median(under)), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Mark:
    """A ratio (with the spread it was measured with) against the most, or least, it may be."""

    name: str
    limit: float
    value: Ratio
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the ratio of medians holds the limit."""
        if self.at_least:
            return self.value.median >= self.limit
        return self.value.median <= self.limit

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return (
            f"{'met   ' if self.met else 'MISSED'}  {self.name}: {self.value} {sign} {self.limit}"
        )


def show_progress(rounds: int) -> Callable[[int], None]:
    """Tells on stderr how far the rounds are."""

    def show(done: int) -> None:
        print(f"\rround {done} of {rounds}", end="\n" if done == rounds else "", file=sys.stderr)

    return show
