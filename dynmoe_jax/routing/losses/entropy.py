"""Entropy of the router's distribution, the "dynamic loss" (Top-P paper eq. 4).

Axis legend: T tokens, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)


@LOSSES.register("entropy")
@dataclasses.dataclass(frozen=True)
class Entropy(RoutingLoss):
    """Mean entropy in nats.

    It keeps the router from buying quality with flat distributions, which use many experts.
    """

    weight: float = weight_setting(
        help="of the router-entropy loss (beta)", formerly=("loss.entropy_weight",)
    )
    controller: str = controller_setting()
    label = "entropy [nats]"
    needs = frozenset({"softmax", "logits"})

    def sums(self, routing, given, params):
        """Entropies, nats."""
        # From logits: log p stays finite where p underflows to 0.
        log_z_T1 = jax.nn.logsumexp(routing.logits_TE, axis=-1, keepdims=True)
        entropy_TE = -routing.probs_TE * (routing.logits_TE - log_z_T1)
        return {"entropy": jnp.sum(over_tokens(entropy_TE, given.valid_T), axis=-1)}

    def value(self, sums, tokens):
        """The mean."""
        return sums["entropy"] / tokens
