"""Units that read the stream alike, as MoEfication's clusters of parameters (arXiv 2110.01786)."""

import dataclasses

import numpy as np

from dynmoe_jax.surgery.experts.clusters import balanced_clusters
from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition

_TINY = 1e-12


@PARTITIONS.register("clusters")
@dataclasses.dataclass(frozen=True)
class Clusters(Partition):
    """Divides units by balanced k-means of their rows, each at length 1."""

    makes_up = False

    def __call__(self, units, num_experts):
        """The cluster of each unit."""
        rows_FD = units.rows().astype(np.float64)
        rows_FD /= np.linalg.norm(rows_FD, axis=1, keepdims=True) + _TINY
        return balanced_clusters(rows_FD, num_experts, units.random())
