"""Units drawn at random, which LLaMA-MoE (arXiv 2406.16554) found best to train on from."""

import dataclasses

import numpy as np

from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition


@PARTITIONS.register("random")
@dataclasses.dataclass(frozen=True)
class Drawn(Partition):
    """Divides units in a random order."""

    def __call__(self, units, num_experts):
        """Each unit's place in a random order says to which expert it goes."""
        size = units.count // num_experts
        return units.random().permutation(np.arange(units.count) // size)
