"""Estimates over seeds, and over documents or steps, and what they say of a claim.

Axis legend: S seeds, R bootstrap replicates, D documents, T tokens, G groups, X logged lines.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

CONFIDENCE = 0.95
YES, NO, UNDECIDED = "yes", "no", "undecided"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval.

    Attributes:
      value: the mean.
      low: lower end of the interval.
      high: upper end.
      seeds: how many there are; with one, nothing is known of what another would give.
      seed_half: half of the interval that seeds alone give (Student's t); NaN with one.
      within_half: half of the one that the inside of runs gives, by a bootstrap: of held-out
        documents, or of the steps of training.
    """

    value: float
    low: float
    high: float
    seeds: int
    seed_half: float = math.nan
    within_half: float = math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends."""
        return self.low, self.high

    def plus(self, number: float) -> "Estimate":
        """The estimate moved by a number."""
        moved = {name: getattr(self, name) + number for name in ("value", "low", "high")}
        return dataclasses.replace(self, **moved)

    def less_than(self, number: float) -> "Estimate":
        """Estimate of how far it is below a number."""
        return dataclasses.replace(
            self, value=number - self.value, low=number - self.high, high=number - self.low
        )

    def cut(self, least: float, most: float) -> "Estimate":
        """The same, its interval without values that cannot be."""
        return dataclasses.replace(self, low=max(self.low, least), high=min(self.high, most))

    def record(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


def estimate(
    value_S: Sequence[float] | Float[np.ndarray, "S"],
    replicate_SR: Float[np.ndarray, "S R"] | None = None,
) -> Estimate:
    """Mean over seeds, its interval of both kinds of chance.

    Seeds give a half-width by Student's t, the inside of runs that of the mean's bootstrap
    replicates; the two are independent, and add up in quadrature.  Held-out documents are the same
    for all seeds, so that their chance does not average out; it does not where every seed's
    replicate is of the same documents.

    Args:
      value_S: of each seed.
      replicate_SR: the same of resampled documents or steps.
    """
    value_S = np.asarray(value_S, np.float64)
    seeds, mean = len(value_S), float(np.mean(value_S)) if len(value_S) else math.nan
    seed_half, within_half = math.nan, math.nan
    if seeds > 1:
        t = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        seed_half = float(t * np.std(value_S, ddof=1) / math.sqrt(seeds))
    if replicate_SR is not None and np.size(replicate_SR):
        mean_R = np.mean(np.asarray(replicate_SR, np.float64), axis=0)
        mean_R = mean_R[np.isfinite(mean_R)]
        if len(mean_R) > 1:
            z = stats.norm.ppf((1 + CONFIDENCE) / 2)
            within_half = float(z * np.std(mean_R, ddof=1))
    halves = [half for half in (seed_half, within_half) if math.isfinite(half)]
    half = math.hypot(*halves) if halves else math.nan
    return Estimate(mean, mean - half, mean + half, seeds, seed_half, within_half)


def verdict(found: Estimate, *, least: float = 0.0, of_training: bool = True) -> str:
    """Whether an estimate is above 0, as the paper says of it: ``yes``, ``no`` or ``undecided``.

    Args:
      found: the estimate, turned so that the paper's claim is that it is positive.
      least: size below which an effect counts as none: ``no`` where all of the interval is below,
        ``yes`` only where the estimate is above.
      of_training: whether it compares trainings; then one seed decides nothing.
    """
    if not all(map(math.isfinite, found.interval)) or (of_training and found.seeds < 2):
        return UNDECIDED
    if found.low > 0 and found.value > least:
        return YES
    return NO if found.high <= least else UNDECIDED


REPLICATES = 200


def for_few(
    replicate_R: Float[np.ndarray, "R"], size_D: Float[np.ndarray, "D"]
) -> Float[np.ndarray, "R"]:
    """Bootstrap replicates spread as far as so few documents ask for.

    The bootstrap of D documents is too narrow by (D - 1) / D of its variance, and the normal
    distribution by Student's t of D - 1 degrees.  D is that of documents of one size that would
    say as much: (sum n)^2 / sum n^2.

    Args:
      replicate_R: of a number.
      size_D: tokens of each document.

    Returns:
      the same around their mean; NaN of fewer than two documents.
    """
    documents = np.sum(size_D) ** 2 / np.sum(np.square(size_D)) if np.any(size_D) else 0.0
    if documents < 2:
        return np.full(len(replicate_R), np.nan)
    level = (1 + CONFIDENCE) / 2
    wider = stats.t.ppf(level, documents - 1) / stats.norm.ppf(level)
    wider *= math.sqrt(documents / (documents - 1))
    known_R = replicate_R[np.isfinite(replicate_R)]
    center = known_R.mean() if len(known_R) else np.nan
    return center + (replicate_R - center) * wider


def resampled_lines(lines: int, seed: int, first: int = 0) -> Int[np.ndarray, "R X"]:
    """Numbers of logged lines, resampled in blocks: neighbors in time are alike.

    Moving blocks, about the square root of all lines long (Künsch 1989).  The same lines of two
    runs from one seed are resampled alike, other lines by themselves.

    Args:
      lines: how many there are, at least one.
      seed: of the run, whose chance is its own.
      first: step of the first of them.
    """
    draw, length = np.random.default_rng([seed, lines, first]), max(1, round(math.sqrt(lines)))
    blocks = -(-lines // length)
    start_RB = draw.integers(0, lines - length + 1, (REPLICATES, blocks))
    number_RX = (start_RB[:, :, None] + np.arange(length)).reshape(REPLICATES, -1)
    return number_RX[:, :lines]
