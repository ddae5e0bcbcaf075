"""Sums over tokens in groups, with the replicates of a bootstrap over documents, in one pass.

A document counts in a replicate as often as a Poisson variable of mean 1 says, which is the
bootstrap for data that come by one by one: memory depends on the number of groups alone, however
much is read.

Axis legend: T tokens, G groups, D documents of a batch, R replicates.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from dynmoe_jax.evaluation.routing.statistics import intervals

REPLICATES = 200


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a batch's tokens.

    Attributes:
      number_T: of the document within this batch, from 0.
      first: number of the first one in all that was read; it may have begun in the batch before.
      weight_DR: how often each counts in each replicate.
    """

    number_T: Int[np.ndarray, "T"]
    first: int
    weight_DR: Float[np.ndarray, "D R"]

    @classmethod
    def numbered(cls, number_T: Int[np.ndarray, "T"], replicates: int = REPLICATES) -> "Documents":
        """Documents by their numbers in all that is read, which rise; at least one token."""
        first, last = int(number_T[0]), int(number_T[-1])
        # A function of the number, so that a document weighs the same in every batch it reaches.
        weights = [
            np.random.default_rng([number, 0x626F6F74]).poisson(1.0, replicates)
            for number in range(first, last + 1)
        ]
        return cls(number_T - first, first, np.array(weights, np.float32))

    def repeated(self, times: int) -> "Documents":
        """The same tokens, so many times behind each other (once for each layer)."""
        return dataclasses.replace(self, number_T=np.tile(self.number_T, times))


@dataclasses.dataclass
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
      mean: the estimate.
      low: lower end; NaN where fewer than two documents say something.
      high: upper end.
      tokens: that it is of.
    """

    mean: float
    low: float
    high: float
    tokens: int

    def record(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


class GroupedMeans:
    """Means of a number over the tokens of each group, with intervals.

    Args:
      groups: G.
      replicates: R.
    """

    def __init__(self, groups: int, replicates: int = REPLICATES):
        self.count_G = np.zeros(groups, np.int64)
        self.sum_G = np.zeros(groups)
        self.documents_G = np.zeros(groups, np.int64)
        self.count_GR = np.zeros((groups, replicates), np.float32)
        self.sum_GR = np.zeros((groups, replicates), np.float32)
        self._open: tuple[int, np.ndarray] = (-1, np.zeros(groups, bool))

    def add(
        self,
        documents: Documents,
        group_T: Int[np.ndarray, "T"],
        value_T: Float[np.ndarray, "T"] | None = None,
    ) -> None:
        """Counts tokens; those in group -1 count nowhere.  Without values, all are 1."""
        inside_T = group_T >= 0
        group_T, number_T = group_T[inside_T], documents.number_T[inside_T]
        value_T = np.ones(len(group_T)) if value_T is None else value_T[inside_T]
        groups, shape = len(self.count_G), (len(self.count_G), len(documents.weight_DR))
        self.count_G += np.bincount(group_T, minlength=groups)
        self.sum_G += np.bincount(group_T, value_T, minlength=groups)
        ones = np.ones(len(group_T), np.float32)
        count_GD = sparse.csr_array((ones, (group_T, number_T)), shape)
        sum_GD = sparse.csr_array((value_T.astype(np.float32), (group_T, number_T)), shape)
        replicates = self.count_GR.shape[1]
        self.count_GR += count_GD @ documents.weight_DR[:, :replicates]
        self.sum_GR += sum_GD @ documents.weight_DR[:, :replicates]
        self._count_documents(documents, count_GD)

    def _count_documents(self, documents: Documents, count_GD: sparse.csr_array) -> None:
        """Counts the documents of each group once, also those that reach over several batches."""
        last = documents.first + count_GD.shape[1] - 1
        self.documents_G += np.diff(count_GD.indptr)
        number, seen_G = self._open
        if number == documents.first:
            self.documents_G -= seen_G & (count_GD[:, [0]].toarray()[:, 0] > 0)
        in_last_G = count_GD[:, [count_GD.shape[1] - 1]].toarray()[:, 0] > 0
        self._open = last, in_last_G | seen_G if number == last else in_last_G

    @property
    def mean_G(self) -> Float[np.ndarray, "G"]:
        """NaN where a group has no token."""
        return _ratio(self.sum_G, self.count_G)

    def estimates(self, parts: list | None = None) -> list[Interval]:
        """Means of all groups, or of parts: indices or slices of groups that are taken together."""
        if parts is None:
            parts = [slice(group, group + 1) for group in range(len(self.count_G))]
        found = []
        for part in parts:
            count, total = self.count_G[part].sum(), self.sum_G[part].sum()
            replicate_R = _ratio(self.sum_GR[part].sum(axis=0), self.count_GR[part].sum(axis=0))
            # Of several groups together at least as many documents as of the largest.
            documents = np.array([self.documents_G[part].max(initial=0)])
            mean = np.array([_ratio(total, count)])
            low, high = intervals(mean, replicate_R[None], documents)
            found.append(Interval(float(mean[0]), float(low[0]), float(high[0]), int(count)))
        return found


def _ratio(total, count):
    """Their quotient, NaN where nothing counts."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)
