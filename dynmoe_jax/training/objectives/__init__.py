"""Objectives of training, one file each; importing the room registers them."""

from dynmoe_jax.training.objectives import language_model, response_only, sparsify
from dynmoe_jax.training.objectives.objective import Batch, Objective, batch_arrays

__all__ = ["Batch", "Objective", "batch_arrays", "language_model", "response_only", "sparsify"]
