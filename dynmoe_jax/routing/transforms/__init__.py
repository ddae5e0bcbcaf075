"""Transforms of a routing before experts compute it, one file each; importing registers them."""

from dynmoe_jax.routing.transforms import capacity, row_budget
from dynmoe_jax.routing.transforms.transform import Transform, chain, dropped

__all__ = ["Transform", "capacity", "chain", "dropped", "row_budget"]
