"""Ways to divide the hidden units of a feed-forward among experts, one file each."""

from dynmoe_jax.surgery.partitions import clusters, coactivation, contiguous, drawn, importance
from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition, Units

__all__ = [
    "PARTITIONS",
    "Partition",
    "Units",
    "clusters",
    "coactivation",
    "contiguous",
    "drawn",
    "importance",
]
