"""Losses that shape a router, one file each; importing the room registers them."""

from dynmoe_jax.routing.losses import (
    activation_locality,
    balance,
    chunk_sparsity,
    cluster_variance,
    coupling,
    deviation,
    diversity,
    entropy,
    free_balance,
    imitation,
    mutual_information,
    router_z,
    sequence_balance,
    simbal,
)
from dynmoe_jax.routing.losses.loss import RoutingLoss, coefficients, moves

__all__ = [
    "RoutingLoss",
    "activation_locality",
    "balance",
    "chunk_sparsity",
    "cluster_variance",
    "coefficients",
    "coupling",
    "deviation",
    "diversity",
    "entropy",
    "free_balance",
    "imitation",
    "moves",
    "mutual_information",
    "router_z",
    "sequence_balance",
    "simbal",
]
