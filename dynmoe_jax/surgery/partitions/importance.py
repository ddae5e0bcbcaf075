"""Units that alike texts depend on, as LLaMA-MoE picks them (arXiv 2406.16554).

Every expert is for one cluster of training text, and units are important for it by the mean of
``|h dL/dh|`` on that text.

Axis legend: F hidden units, E experts, and as many clusters of text.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from dynmoe_jax.surgery.experts.clusters import balanced_assignment
from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition, Units

STATISTIC = "gradient_importance"


@PARTITIONS.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance(Partition):
    """Divides units so that the importance of each for the text of its expert adds up to most."""

    statistics: ClassVar = frozenset({STATISTIC})
    of_clusters: ClassVar = True

    def __call__(self, units, num_experts):
        """The expert of each unit."""
        return assigned(importance(units))


def importance(units: Units) -> Float[np.ndarray, "E F"]:
    """Importance of units by cluster of text, as a share of that of all of them.

    Gradients of some texts are larger than those of others, which says nothing of a unit.
    """
    found = np.asarray(units.given.statistic(STATISTIC, units.layer), np.float64)
    importance_EF = found.reshape(-1, units.count)
    return importance_EF / np.maximum(importance_EF.sum(axis=1, keepdims=True), 1e-300)


def assigned(importance_EF: Float[np.ndarray, "E F"]) -> Int[np.ndarray, "F"]:
    """The expert of each unit, all of one size, by most importance in total."""
    return balanced_assignment(-importance_EF.T)


def most_important(
    importance_EF: Float[np.ndarray, "E F"], width: int
) -> list[Int[np.ndarray, "width"]]:
    """The most important units of each expert, rising ("sharing inner").

    Some may be in several experts, and others in none.
    """
    first = np.argsort(-importance_EF, axis=1, kind="stable")[:, :width]
    return list(np.sort(first, axis=1))


def shared_by_most(
    importance_EF: Float[np.ndarray, "E F"], width: int, count: int
) -> Int[np.ndarray, "count"]:
    """The units that are among the most important of most experts, rising ("sharing inter").

    Args:
      importance_EF: of units.
      width: units of an expert.
      count: units that are wanted; of equally many experts' those of more importance in total.
    """
    chosen = np.concatenate(most_important(importance_EF, width))
    often_F = np.bincount(chosen, minlength=importance_EF.shape[1])
    order = np.lexsort((-importance_EF.sum(axis=0), -often_F))
    return np.sort(order[:count])
