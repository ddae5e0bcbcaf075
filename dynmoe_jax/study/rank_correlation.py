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


class RankCorrelations:
    """Rank correlations of a number of every token with others.

    Ranks are those among all tokens; replicates weigh documents and keep the ranks.

    Args:
      x_T: the number.
      document_T: of each token, from 0.
      weight_DR: how often each document counts in each replicate.
    """

    def __init__(
        self,
        x_T: np.ndarray,
        document_T: Int[np.ndarray, "T"],
        weight_DR: Float[np.ndarray, "D R"],
    ):
        self._rank_T, self._documents = _ranks(x_T), (document_T, weight_DR)

    def whole(self, y_T: np.ndarray) -> Correlation:
        """Spearman's correlation with another number."""
        return _correlation(self._rank_T, _ranks(y_T), *self._documents)

    def within(self, y_T: np.ndarray, group_T: Int[np.ndarray, "T"]) -> Correlation:
        """Correlation of what is left of both ranks without the means of groups of tokens.

        0 where within every group one says nothing about the other, however the groups differ.

        Args:
          y_T: the other number.
          group_T: numbers of groups, from 0.
        """
        left = (r_T - _group_means(r_T, group_T) for r_T in (self._rank_T, _ranks(y_T)))
        return _correlation(*left, *self._documents)

    def across(self, y_T: np.ndarray, group_T: Int[np.ndarray, "T"]) -> Correlation:
        """Correlation of the mean ranks of groups, each weighed by its tokens; see above."""
        means = (_group_means(r_T, group_T) for r_T in (self._rank_T, _ranks(y_T)))
        return _correlation(*means, *self._documents)


def _ranks(value_T: np.ndarray) -> Float[np.ndarray, "T"]:
    """Ranks around 0; equal values have the mean of theirs."""
    rank_T = stats.rankdata(value_T)
    return rank_T - rank_T.mean()


def _group_means(value_T, group_T):
    """The mean of each token's group."""
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
