"""Rank correlations over tokens, whole, within groups and across them.

Axis legend: T tokens, G groups, D documents, R bootstrap replicates, N layers.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from dynmoe_jax.study.statistics import for_few


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
        replicate_R = for_few(_pearson(sum_6D @ weight_DR), sum_6D[0])
        return Correlation(float(_pearson(sum_6D.sum(axis=1))), replicate_R)


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
