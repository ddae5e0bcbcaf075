"""Hugging Face checkpoints.

An architecture is one table: names of foreign tensors, the parameter of ours that each is a slice
of, and the layout between the two (:mod:`.architectures.mapping`).  The same table reads both ways;
tests map gradients back with it.
"""

from dynmoe_jax.interop.load import load_hf
from dynmoe_jax.runs.errors import CheckpointError

__all__ = ["CheckpointError", "load_hf"]
