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
        ``yes`` where it is above 0 and reaches beyond.
      of_training: whether it compares trainings; then one seed decides nothing.
    """
    if not all(map(math.isfinite, found.interval)) or (of_training and found.seeds < 2):
        return UNDECIDED
    if found.low > 0 and found.high > least:
        return YES
    return NO if found.high <= least else UNDECIDED


REPLICATES = 200


def resampled_lines(lines: int, seed: int) -> Int[np.ndarray, "R X"]:
    """Numbers of logged lines, resampled in blocks: neighbors in time are alike.

    Moving blocks, about the square root of all lines long (Künsch 1989).

    Args:
      lines: how many there are.
      seed: of the run, whose chance is its own.
    """
    draw, length = np.random.default_rng([seed, lines]), max(1, round(math.sqrt(lines)))
    blocks = -(-lines // length)
    start_RB = draw.integers(0, lines - length + 1, (REPLICATES, blocks))
    number_RX = (start_RB[:, :, None] + np.arange(length)).reshape(REPLICATES, -1)
    return number_RX[:, :lines]


# ── Rank correlations ────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A correlation of ranks, and the same of resampled documents.

    Attributes:
      value: Spearman's; NaN where one of the two does not vary.
      replicate_R: of resampled documents.
    """

    value: float
    replicate_R: Float[np.ndarray, "R"]


def ranks(value_T: np.ndarray) -> Float[np.ndarray, "T"]:
    """Ranks around 0; equal values have the mean of theirs."""
    rank_T = stats.rankdata(value_T)
    return rank_T - rank_T.mean()


def rank_correlation(
    x_T: np.ndarray,
    y_T: np.ndarray,
    document_T: Int[np.ndarray, "T"],
    weight_DR: Float[np.ndarray, "D R"],
) -> Correlation:
    """Spearman's correlation of two numbers of every token.

    Ranks are those among all tokens; replicates weigh documents and keep the ranks.

    Args:
      x_T: one number.
      y_T: the other.
      document_T: of each token, from 0.
      weight_DR: how often each document counts in each replicate.
    """
    return _correlation(ranks(x_T), ranks(y_T), document_T, weight_DR)


def rank_correlation_within(
    x_T: np.ndarray,
    y_T: np.ndarray,
    group_T: Int[np.ndarray, "T"],
    document_T: Int[np.ndarray, "T"],
    weight_DR: Float[np.ndarray, "D R"],
) -> Correlation:
    """Correlation of ranks within groups of tokens: of what is left of them without group means.

    0 where within every group one says nothing about the other, however the groups differ.
    Arguments as of :func:`rank_correlation`; ``group_T`` are numbers of groups from 0.
    """
    x_T, y_T = ranks(x_T), ranks(y_T)
    x_T, y_T = x_T - _group_means(x_T, group_T), y_T - _group_means(y_T, group_T)
    return _correlation(x_T, y_T, document_T, weight_DR)


def rank_correlation_across(
    x_T: np.ndarray,
    y_T: np.ndarray,
    group_T: Int[np.ndarray, "T"],
    document_T: Int[np.ndarray, "T"],
    weight_DR: Float[np.ndarray, "D R"],
) -> Correlation:
    """Correlation of the mean ranks of groups, each weighed by its tokens; arguments as above."""
    x_T, y_T = (_group_means(ranks(values_T), group_T) for values_T in (x_T, y_T))
    return _correlation(x_T, y_T, document_T, weight_DR)


def _group_means(value_T, group_T):
    count_G = np.bincount(group_T)
    return (np.bincount(group_T, value_T) / np.maximum(count_G, 1))[group_T]


def _correlation(x_T, y_T, document_T, weight_DR) -> Correlation:
    """Pearson's correlation, replicates by the sums of each document."""
    documents = len(weight_DR)
    parts = (np.ones_like(x_T), x_T, y_T, x_T * x_T, y_T * y_T, x_T * y_T)
    sum_6D = np.stack([np.bincount(document_T, part, documents) for part in parts])
    with np.errstate(invalid="ignore", divide="ignore"):
        return Correlation(float(_pearson(sum_6D.sum(axis=1))), _pearson(sum_6D @ weight_DR))


def _pearson(sums):
    count, x, y, xx, yy, xy = sums
    spread_x, spread_y = xx / count - (x / count) ** 2, yy / count - (y / count) ** 2
    # What rounding leaves of a number that does not vary is no spread.
    varies = (spread_x > 1e-9 * (xx / count + 1)) & (spread_y > 1e-9 * (yy / count + 1))
    return np.where(varies, (xy / count - x * y / count**2) / np.sqrt(spread_x * spread_y), np.nan)


def shuffled_within(
    value_NT: np.ndarray, group_T: Int[np.ndarray, "T"], seed: int = 0
) -> np.ndarray:
    """The columns of an array shuffled among the tokens of each group."""
    draw = np.random.default_rng(seed)
    mixed = np.lexsort((draw.random(len(group_T)), group_T))
    ordered = np.argsort(group_T, kind="stable")
    found = np.empty_like(value_NT)
    found[:, ordered] = value_NT[:, mixed]
    return found
