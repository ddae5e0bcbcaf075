"""Diversity and simplicity of experts' vectors (DynMoE, arXiv 2405.14297, section 3.3).

Axis legend: D model width, E experts.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    times_tokens,
    weight_setting,
)


@LOSSES.register("diversity")
@dataclasses.dataclass(frozen=True)
class Diversity(RoutingLoss):
    """How far experts' vectors are from orthogonal ones, and their mean length.

    ``|V^T V - I|_F + mean_e |w_e|``, V the vectors w_e at length 1, over the experts that are
    there.  The first term keeps experts from being alike, the second their vectors from growing.
    """

    weight: float = weight_setting(help="of the diversity loss of experts' vectors")
    controller: str = controller_setting()
    label = "diversity"
    needs = frozenset({"expert_vectors"})

    def sums(self, routing, given, params):
        """The loss times the tokens: it is one of parameters alone."""
        w_DE, live_E = params["router_DE"], given.state["live_E"]
        length_E = _root(jnp.sum(jnp.square(w_DE), axis=0))
        unit_DE = w_DE / jnp.where(length_E > 0, length_E, 1.0)
        alike_EE = unit_DE.T @ unit_DE - jnp.eye(w_DE.shape[1])
        alike = _root(jnp.sum(jnp.square(alike_EE * live_E * live_E[:, None])))
        simple = jnp.sum(live_E * length_E) / jnp.maximum(jnp.sum(live_E), 1)
        return {"diversity": times_tokens(alike + simple, given)}

    def value(self, sums, tokens):
        """The loss."""
        return sums["diversity"] / tokens


def _root(square):
    """Square root whose gradient at 0 is 0: orthogonal vectors have nothing to learn."""
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0)
