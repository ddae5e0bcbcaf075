"""Router orthogonality: similar tokens get similar experts when its rows are orthonormal.

SimBal, arXiv 2506.14038.

Axis legend: D model width, E experts.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.fields import AUTO
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    times_tokens,
    weight_setting,
)


@LOSSES.register("simbal")
@dataclasses.dataclass(frozen=True)
class SimBal(RoutingLoss):
    """Sum of the absolute entries of W W^T - I, W the router's matrix [E, D]."""

    weight: float = weight_setting(
        help="of the orthogonality loss of routers (0.1 is usual; the paper's was not found)"
    )
    controller: str = controller_setting()
    label = "orthogonality"
    needs = frozenset({"router_DE"})

    def obstacle(self, num_experts, width):
        """Says so where so many rows cannot be orthogonal."""
        if num_experts > width:
            weight = "auto" if self.weight == AUTO else self.weight
            return (
                f"weight={weight} needs config.model.moe.num_experts={num_experts} to be at most "
                f"config.model.width={width}, or rows cannot be orthogonal; set it to 0"
            )
        return None

    def sums(self, routing, given, params):
        """The loss, once for every token."""
        router_DE = params["router_DE"]
        gram_EE = router_DE.T @ router_DE
        loss = jnp.sum(jnp.abs(gram_EE - jnp.eye(gram_EE.shape[0])))
        return {"distance": times_tokens(loss, given)}

    def value(self, sums, tokens):
        """The mean."""
        return sums["distance"] / tokens
