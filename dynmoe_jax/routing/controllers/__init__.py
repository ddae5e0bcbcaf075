"""Controllers of the coefficients of losses, one file each; importing the room registers them."""

from dynmoe_jax.routing.controllers import drop_rate, linear
from dynmoe_jax.routing.controllers.controller import Controller, LayerCounts

__all__ = ["Controller", "LayerCounts", "drop_rate", "linear"]
