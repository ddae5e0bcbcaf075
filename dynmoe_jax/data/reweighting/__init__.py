"""Rules that move the weights of domains while a run trains, one file each."""

from dynmoe_jax.data.reweighting import dynamic_batch_loading
from dynmoe_jax.data.reweighting.reweighting import Reweighting

__all__ = ["Reweighting", "dynamic_batch_loading"]
