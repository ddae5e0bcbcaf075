"""Coefficient of each layer by its own share of dropped choices (Skywork-MoE, arXiv 2406.06563).

Axis legend: N MoE layers.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import CONTROLLERS
from dynmoe_jax.routing.controllers.controller import Controller, share_dropped, state_of


@CONTROLLERS.register("drop_rate")
@dataclasses.dataclass(frozen=True)
class DropRate(Controller):
    """a_l <- b a_l + (1 - b) min(xi d_l, a_max), d_l the share that layer l has dropped.

    Where nothing can be dropped (no capacity, no row budget) the coefficient goes to 0.
    """

    gain: float = free_setting(0.2, "coefficient for each share that is dropped (xi)", above=0.0)
    largest: float = free_setting(0.01, "largest coefficient (a_max)", above=0.0)
    memory: float = free_setting(0.99, "share of the old coefficient (b)", low=0.0, high=0.9999)
    per_layer = True

    def initial(self, weight, layers):
        """The coefficient that the settings name, in every layer."""
        return state_of(coefficient_N=jnp.full(layers, weight))

    def coefficient(self, weight, state, step):
        """One for each layer."""
        return state["coefficient_N"]

    def update(self, state, counts):
        """The next coefficients."""
        aim_N = jnp.minimum(self.gain * share_dropped(counts), self.largest)
        moved_N = self.memory * state["coefficient_N"] + (1 - self.memory) * aim_N
        return state_of(coefficient_N=moved_N)
