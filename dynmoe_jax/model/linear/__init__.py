"""Linear maps of the model: their products, and kinds of matrices, one file each.

Importing the room registers the kinds.
"""

from dynmoe_jax.model.linear import dense, lora, two_layer
from dynmoe_jax.model.linear.kind import LinearKind

__all__ = ["LinearKind", "dense", "lora", "two_layer"]
