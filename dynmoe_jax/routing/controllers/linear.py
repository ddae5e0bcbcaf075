"""Coefficient that moves linearly from the weight to another value: a schedule, without state."""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import CONTROLLERS
from dynmoe_jax.routing.controllers.controller import Controller


@CONTROLLERS.register("linear")
@dataclasses.dataclass(frozen=True)
class Linear(Controller):
    """Goes from the weight to ``final`` between two steps, and stays there."""

    final: float = free_setting(0.0, "coefficient at the end", low=0.0)
    begin: int = free_setting(0, "step until which it is the weight", unit="steps", low=0)
    end: int = free_setting(1000, "step from which it is the final one", unit="steps", low=1)

    def coefficient(self, weight, state, step):
        """One for all layers."""
        span = max(self.end - self.begin, 1)
        share = jnp.clip((step - self.begin) / span, 0.0, 1.0)
        return jnp.float32(weight) + share * (self.final - weight)
