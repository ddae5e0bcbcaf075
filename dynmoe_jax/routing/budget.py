"""Budgets of experts per token: rules that move the threshold p of top-p so that one is held.

A rule has one p for all layers, and layers share the budget as their routers see fit.  The quantile
is the default: it holds a budget closer, and at once (docs/measurements.md: budget-rules).

Axis legend: T tokens, E experts, N MoE layers, M masses of a token, B bins.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.routing.quantiles import histogram, quantile
from dynmoe_jax.routing.record import Routing
from dynmoe_jax.routing.router import Params, RouterInput


@dataclasses.dataclass(frozen=True)
class Budget(abc.ABC):
    """A budget, and the rule that holds it.

    Attributes:
      experts_per_token: mean to hold, over all valid tokens of all layers (a*).
      num_experts: E.
      fewest: experts that a token uses at the least.
      most: experts that a token may use at the most.
      start: p before the first update (p_0).
      highest: largest p.
      gains: (K_p, K_i), for rules that have some.
    """

    experts_per_token: float
    num_experts: int
    fewest: int
    most: int
    start: float
    highest: float
    gains: tuple[float, float]

    def initial(self) -> dict[str, Array]:
        """State of one layer; ``threshold`` is p."""
        return {"threshold": jnp.float32(self.start)}

    @abc.abstractmethod
    def measure(self, given: RouterInput, routing: Routing) -> dict[str, Array]:
        """Sums over the valid tokens of one layer."""

    @abc.abstractmethod
    def next(self, state_N: Params, seen_N: Any) -> dict[str, Array]:
        """States of all layers after an applied update; a batch of padding alone changes nothing.

        Args:
          state_N: their states before it.
          seen_N: their sums.
        """


class Quantile(Budget):
    """The p that would have held the budget in this batch: no gains to tune.

    A token uses ``fewest`` experts and one more for every m from there to ``most`` - 1 whose m most
    probable experts hold at most p.  So the mean is a* where p is the (a* - fewest) / (most -
    fewest) quantile of those masses.
    """

    def measure(self, given, routing):
        """Histogram of the cumulative probabilities that p is compared with."""
        sorted_TE = -jnp.sort(-jax.lax.stop_gradient(routing.probs_TE), axis=-1)
        mass_TM = jnp.cumsum(sorted_TE, axis=-1)[:, self.fewest - 1 : self.most - 1]
        return {"mass_B": histogram(mass_TM, given.valid_T)}

    def next(self, state_N, seen_N):
        """The quantile over all layers."""
        # Of many layers together more than 32 bits count.
        count_B = jnp.sum(seen_N["mass_B"].astype(jnp.float32), axis=0)
        share = (self.experts_per_token - self.fewest) / max(self.most - self.fewest, 1)
        p = jnp.clip(quantile(count_B, share), 0.0, self.highest)
        return {"threshold": jnp.where(jnp.sum(count_B) > 0, p, state_N["threshold"])}


class ProportionalIntegral(Budget):
    """p = p_0 + K_p e + K_i sum e, with e = (a* - a) / E (DTop-p, arXiv 2512.13996).

    a is the mean of the batch.  p stays within 0 and ``highest``; while a bound holds it back, the
    sum takes no more errors that push it further (anti-windup).
    """

    def initial(self):
        """p and the sum of errors."""
        return super().initial() | {"integral": jnp.float32(0)}

    def measure(self, given, routing):
        """Experts that the tokens use, and tokens."""
        return {
            "used": jnp.sum(routing.experts_per_token_T),
            "tokens": jnp.sum(given.valid_T, dtype=jnp.int32),
        }

    def next(self, state_N, seen_N):
        """One step of the controller."""
        used, tokens = (jnp.sum(seen_N[name].astype(jnp.float32)) for name in ("used", "tokens"))
        mean = used / jnp.maximum(tokens, 1)
        p_N, integral_N = self.step(state_N["integral"], mean)
        after = {"threshold": p_N, "integral": integral_N}
        return {name: jnp.where(tokens > 0, after[name], state_N[name]) for name in after}

    def step(
        self, integral: Float[Array, "*N"], mean: Float[Array, ""]
    ) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
        """(p, sum of errors) after a batch with that mean of experts per token."""
        of_error, of_integral = self.gains
        error = (self.experts_per_token - mean) / self.num_experts
        whole = integral + error
        wanted = self.start + of_error * error + of_integral * whole
        bound = ((wanted > self.highest) & (error > 0)) | ((wanted < 0) & (error < 0))
        return jnp.clip(wanted, 0.0, self.highest), jnp.where(bound, integral, whole)


RULES: dict[str, type[Budget]] = {
    "quantile": Quantile,
    "proportional_integral": ProportionalIntegral,
}
"""Rules by name."""
