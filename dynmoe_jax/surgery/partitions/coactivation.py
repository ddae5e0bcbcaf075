"""Units that are on for the same tokens, as MoEfication's graph of co-activation (2110.01786).

Axis legend: F hidden units, E experts, P edges from all units.
"""

import dataclasses
import importlib.util
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.experts.clusters import evened
from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition

STATISTIC = "coactivation"
_NEIGHBORS = 64
"""Edges of a unit to those that it is on with most; others of a large layer are left out."""

_STEPS = 1000
"""Weights of edges are integers up to this: all of them together must stay below 2^31."""


@PARTITIONS.register("coactivation")
@dataclasses.dataclass(frozen=True)
class Coactivation(Partition):
    """Cuts the graph of units that are on together where the edges are weak, by METIS.

    Its parts differ a little in size; units then move, those that lose the least, until they don't.
    """

    statistics: ClassVar = frozenset({STATISTIC})
    makes_up: ClassVar = False

    def check(self):
        """Raises ConfigError without METIS."""
        if importlib.util.find_spec("pymetis") is None:
            raise ConfigError(
                "--by=coactivation needs METIS, which is not installed; install it with "
                "pip install 'dynmoe_jax[surgery]', or take --by=clusters."
            )

    def __call__(self, units, num_experts):
        """The part of each unit."""
        weight_FF = np.array(units.given.statistic(STATISTIC, units.layer), np.float64)
        np.fill_diagonal(weight_FF, 0.0)
        part_F = _cut(weight_FF, num_experts)
        with_part_FE = np.stack(
            [weight_FF[:, part_F == part].sum(axis=1) for part in range(num_experts)], axis=1
        )
        with_own_F1 = np.take_along_axis(with_part_FE, part_F[:, None], axis=1)
        # A unit that would gain by a move loses nothing by it: so none does to begin with.
        return evened(np.maximum(with_own_F1 - with_part_FE, 0.0), part_F)


def _cut(weight_FF: Float[np.ndarray, "F F"], parts: int) -> Int[np.ndarray, "F"]:
    """Parts of a graph of about one size."""
    import pymetis

    starts, ends_P, weights_P = _edges(weight_FF)
    graph = pymetis.CSRAdjacency(starts, ends_P)
    _, part_F = pymetis.part_graph(parts, graph, eweights=weights_P)
    return np.asarray(part_F)


def _edges(weight_FF) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(where the edges of each unit start, units at their ends, weights), both ways each."""
    count = min(_NEIGHBORS, len(weight_FF) - 1)
    weakest_F = np.partition(weight_FF, -count, axis=1)[:, -count]
    strong_FF = weight_FF >= weakest_F[:, None]
    scaled_FF = np.ceil(_STEPS * weight_FF / max(weight_FF.max(), 1e-300)).astype(np.int32)
    kept_FF = (strong_FF | strong_FF.T) & (scaled_FF > 0)
    starts = np.concatenate([[0], np.cumsum(kept_FF.sum(axis=1))])
    return starts, np.nonzero(kept_FF)[1], scaled_FF[kept_FF]
