"""Losses that shape a router, one file each; importing the room registers them."""

from dynmoe_jax.routing.losses import (
    activation_locality,
    balance,
    chunk_sparsity,
    entropy,
    router_z,
)
from dynmoe_jax.routing.losses.loss import RoutingLoss, coefficients, moves

__all__ = [
    "RoutingLoss",
    "activation_locality",
    "balance",
    "chunk_sparsity",
    "coefficients",
    "entropy",
    "moves",
    "router_z",
]
