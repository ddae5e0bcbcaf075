"""Variance of routing probabilities within and between clusters of experts.

MoEC (arXiv 2207.09094): experts of a cluster shall be as probable as each other, so that they share
tokens, and clusters unlike each other.

Axis legend: T tokens, E experts, C clusters, L = E / C experts of one.
"""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)


@LOSSES.register("cluster_variance")
@dataclasses.dataclass(frozen=True)
class ClusterVariance(RoutingLoss):
    """mean_t (w_intra V_intra - w_inter V_inter), clusters being neighbors.

    V_intra is the variance of the probabilities within the cluster of the token's most probable
    expert, or the mean over all clusters; V_inter that of the clusters' mean probabilities.  It may
    be negative.
    """

    weight: float = weight_setting(help="of the cluster variance loss (MoEC: mu)")
    clusters: int = free_setting(2, "clusters of neighboring experts", low=1)
    intra: float = free_setting(1.0, "weight of the variance within a cluster", low=0.0)
    inter: float = free_setting(1.0, "weight of the variance between clusters", low=0.0)
    within: str = free_setting(
        "first",
        "clusters whose variance is lowered: that of a token's most probable expert, or all",
        choices=("first", "all"),
    )
    controller: str = controller_setting()
    label = "cluster variance"
    needs = frozenset({"distribution"})

    def obstacle(self, num_experts: int, width: int) -> str | None:
        """Says so where clusters do not come out even."""
        if num_experts % self.clusters:
            return (
                f"clusters={self.clusters} must divide config.model.moe.num_experts={num_experts}"
            )
        return None

    def sums(self, routing, given, params):
        """The two variances."""
        probs_TE = routing.probs_TE[..., : routing.num_experts]
        probs_TCL = probs_TE.reshape(*probs_TE.shape[:-1], self.clusters, -1)
        intra_TC = jnp.var(probs_TCL, axis=-1)
        if self.within == "first":
            first_T1 = jnp.argmax(probs_TE, axis=-1, keepdims=True) // probs_TCL.shape[-1]
            intra_TC = jnp.take_along_axis(intra_TC, first_T1, axis=-1)
        intra_T1 = jnp.mean(intra_TC, axis=-1, keepdims=True)
        inter_T1 = jnp.var(jnp.mean(probs_TCL, axis=-1), axis=-1, keepdims=True)
        return {
            "intra": over_tokens(intra_T1, given.valid_T)[..., 0],
            "inter": over_tokens(inter_T1, given.valid_T)[..., 0],
        }

    def value(self, sums, tokens):
        """The mean."""
        return (self.intra * sums["intra"] - self.inter * sums["inter"]) / tokens
