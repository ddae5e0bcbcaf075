"""Corruptions of training text, one file each; importing the room registers them."""

from dynmoe_jax.data.corruption import ul2
from dynmoe_jax.data.corruption.corruption import Corrupt, Corruption, Example

__all__ = ["Corrupt", "Corruption", "Example", "ul2"]
