"""Squared deviation of mean probabilities from even ones (Skywork-MoE, arXiv 2406.06563).

Axis legend: T tokens, E experts.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)


@LOSSES.register("deviation")
@dataclasses.dataclass(frozen=True)
class Deviation(RoutingLoss):
    """sum_e (1/E - mean_t p_te)^2: it balances probabilities, and knows no choice."""

    weight: float = weight_setting(
        help="of the squared deviation of mean probabilities (Skywork-MoE moves it by layer: "
        "controller drop_rate)"
    )
    controller: str = controller_setting()
    label = "deviation"
    needs = frozenset({"distribution"})
    additive = False

    def sums(self, routing, given, params):
        """Probabilities of each expert."""
        return {"probs_E": over_tokens(routing.probs_TE, given.valid_T)}

    def value(self, sums, tokens):
        """The squares; 0 where there is no token."""
        mean_E = sums["probs_E"] / tokens
        # The probabilities of no token sum up to 0, of others to 1.
        even = jnp.sum(mean_E, axis=-1, keepdims=True) / mean_E.shape[-1]
        return jnp.sum(jnp.square(even - mean_E), axis=-1)
