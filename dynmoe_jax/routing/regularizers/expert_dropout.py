"""Expert dropout, of experts one by one or by clusters (MoEC, arXiv 2207.09094).

It is a change of the logits, not a transform of the routing: tokens choose among the experts that
are left, instead of losing those of their experts that are dead.

Axis legend: T tokens, E experts, K slots per token.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dynmoe_jax.fields import ConfigError, free_setting
from dynmoe_jax.registry import REGULARIZERS
from dynmoe_jax.routing.record import DEAD, Routing, used_first
from dynmoe_jax.routing.regularizers.regularizer import Regularizer
from dynmoe_jax.routing.router import RouterInput

_PURPOSE = 0x64726F70
"""Tells its draws from those of others."""


@REGULARIZERS.register("expert_dropout")
@dataclasses.dataclass(frozen=True)
class ExpertDropout(Regularizer):
    """No token can choose the experts that are dead for some steps; each layer draws its own.

    Experts form clusters of L = E / clusters neighbors.  ``"within_cluster"`` keeps
    floor((1 - r) L) of each, the same places in all (the authors' code); ``"whole_cluster"`` keeps
    all experts of all but floor(r clusters).  One cluster is plain expert dropout.
    """

    rate: float = free_setting(0.5, "share of the experts that are dead (r)", low=0.0, high=0.9)
    clusters: int = free_setting(1, "clusters of neighboring experts", low=1)
    mode: str = free_setting(
        "within_cluster",
        "dead are as many experts of every cluster, or whole clusters",
        choices=("within_cluster", "whole_cluster"),
    )
    interval: int = free_setting(250, "steps for which a draw holds", unit="steps", low=1)
    reads = frozenset({"step"})

    def obstacle(self, num_experts: int, fewest: int) -> str | None:
        """Says so where clusters do not come out even, or too few experts are left."""
        if num_experts % self.clusters:
            return (
                f"clusters={self.clusters} must divide config.model.moe.num_experts={num_experts}"
            )
        if (alive := self.alive(num_experts)) < max(fewest, 1):
            return (
                f"rate={self.rate:g} must leave at least {max(fewest, 1)} of "
                f"config.model.moe.num_experts={num_experts} alive, and leaves {alive}"
            )
        return None

    def alive(self, num_experts: int) -> int:
        """Experts that are left."""
        size = num_experts // self.clusters
        if self.mode == "whole_cluster":
            return (self.clusters - _floor(self.rate * self.clusters)) * size
        return self.clusters * _floor((1 - self.rate) * size)

    def alive_E(self, given: RouterInput, num_experts: int) -> Bool[Array, "E"]:
        """Whether an expert is alive in this step."""
        size = num_experts // self.clusters
        whole = self.mode == "whole_cluster"
        places, each = (self.clusters, size) if whole else (size, self.clusters)
        kept = self.alive(num_experts) // each
        order = jax.random.permutation(given.held_key(self.interval, _PURPOSE), places)
        alive = jnp.zeros(places, bool).at[order[:kept]].set(True)
        return jnp.repeat(alive, size) if whole else jnp.tile(alive, self.clusters)

    def __call__(self, given: RouterInput, scores) -> RouterInput:
        """Takes the dead out of the candidates."""
        experts = given.num_experts or given.logits_TE.shape[-1]
        # A router may score more than the experts: no-ops behind them, which never die.
        more = given.logits_TE.shape[-1] - experts
        alive_E = jnp.pad(self.alive_E(given, experts), (0, more), constant_values=True)
        return dataclasses.replace(given, logits_TE=jnp.where(alive_E, given.logits_TE, DEAD))

    def behind(self, routing: Routing, given: RouterInput) -> Routing:
        """Takes back the dead that a router chose whatever their logits."""
        if not isinstance(routing, Routing):
            raise ConfigError(
                "config.model.moe.regularizers='expert_dropout' has no effect on a router that "
                "mixes all tokens for every expert; leave it empty."
            )
        alive_E = self.alive_E(given, routing.num_experts)
        kept_TK = routing.used_TK & jnp.append(alive_E, False)[routing.expert_TK]
        return used_first(
            dataclasses.replace(
                routing,
                expert_TK=jnp.where(kept_TK, routing.expert_TK, routing.num_experts),
                weight_TK=jnp.where(kept_TK, routing.weight_TK, 0.0),
            )
        )


def _floor(x: float) -> int:
    """The whole part, of what is whole but for rounding too: (1 - 0.9) 10 is 1."""
    return math.floor(x + 1e-6)
