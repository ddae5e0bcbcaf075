"""Mutual information of tokens and experts, negated (DS-MoE, arXiv 2404.05567).

Axis legend: T tokens, E experts.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)


@LOSSES.register("mutual_information")
@dataclasses.dataclass(frozen=True)
class MutualInformation(RoutingLoss):
    """Negated mutual information: small where tokens are sure of their experts, and differ in them.

    H(e|x) - H(e), where H(e) is the entropy of the mean distribution of all tokens, and H(e|x) the
    mean entropy of theirs.  It lies between -log E and 0, in every layer by itself: of a mean over
    layers, two that collapse onto opposite halves of the experts would look balanced.
    """

    weight: float = weight_setting(help="of the mutual-information loss (alpha)")
    controller: str = controller_setting()
    label = "mutual information, negated [nats]"
    needs = frozenset({"distribution"})
    additive = False

    def sums(self, routing, given, params):
        """Probabilities, and entropies of tokens."""
        return {
            "probs_E": over_tokens(routing.probs_TE, given.valid_T),
            "entropy": over_tokens(_entropy(routing.probs_TE)[:, None], given.valid_T)[0],
        }

    def value(self, sums, tokens):
        """H(e|x) - H(e), nats."""
        return sums["entropy"] / tokens - _entropy(sums["probs_E"] / tokens)


def _entropy(probs_XE: Float[Array, "*X E"]) -> Float[Array, "*X"]:
    """Entropies in nats; a probability of 0 has no share in them, and no infinite gradient."""
    return -jnp.sum(probs_XE * jnp.log(jnp.maximum(probs_XE, 1e-30)), axis=-1)
