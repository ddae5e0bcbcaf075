"""Interleaved timing, and ratios that carry their spread.

On a machine that other work shares, absolute times drift by tens of percent within a minute.  So
every round runs each case once, and two cases are compared by what they took in the same rounds.
"""

import dataclasses
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
) -> dict[str, Float[np.ndarray, "rounds"]]:
    """Seconds of each case in each round, after one round to warm up.

    Args:
      cases: each runs once and returns the seconds that it took.
      rounds: rounds that count.  A case ``SLOW`` times slower than the fastest in the warm-up
        runs in the first ``SLOW_ROUNDS`` alone; the rest of its rounds are NaN.
      on_round: told the number of rounds done.
    """
    warmup = {name: run() for name, run in cases.items()}
    limit = SLOW * min(warmup.values())
    seconds = {name: np.full(rounds, np.nan) for name in cases}
    for i in range(rounds):
        for name, run in cases.items():
            if i < SLOW_ROUNDS or warmup[name] <= limit:
                # Worker threads of the case before (OpenMP, Eigen) spin a little before they sleep.
                time.sleep(PAUSE_S)
                seconds[name][i] = run()
        on_round(i + 1)
    return seconds


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
