"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5).

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


@LOSSES.register("router_z")
@dataclasses.dataclass(frozen=True)
class RouterZ(RoutingLoss):
    """Mean squared logsumexp of the router logits."""

    weight: float = weight_setting(
        help="of the router z-loss (ST-MoE uses 1e-3)", formerly=("loss.router_z_weight",)
    )
    controller: str = controller_setting()
    label = "router z"
    needs = frozenset({"logits"})

    def sums(self, routing, given, params):
        """Squares."""
        log_z_T1 = jax.nn.logsumexp(routing.logits_TE, axis=-1, keepdims=True)
        return {"squared_z": over_tokens(jnp.square(log_z_T1), given.valid_T)[..., 0]}

    def value(self, sums, tokens):
        """The mean."""
        return sums["squared_z"] / tokens
