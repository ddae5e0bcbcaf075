"""Neighbouring units together, as FactorLLM cuts them (arXiv 2408.11855)."""

import dataclasses

import numpy as np

from dynmoe_jax.surgery.partitions.partition import PARTITIONS, Partition


@PARTITIONS.register("contiguous")
@dataclasses.dataclass(frozen=True)
class Contiguous(Partition):
    """Divides units in the order in which they are stored."""

    def __call__(self, units, num_experts):
        """The first F / E units are the first expert, and so on."""
        return np.arange(units.count) // (units.count // num_experts)
