"""Regularizers of routing in training, one file each; importing registers them."""

from dynmoe_jax.routing.regularizers import expert_dropout, jitter
from dynmoe_jax.routing.regularizers.regularizer import Regularizer

__all__ = ["Regularizer", "expert_dropout", "jitter"]
