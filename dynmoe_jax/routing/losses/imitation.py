"""Imitation of an oracle that knows which experts give the most like their share of the output.

FactorLLM, arXiv 2408.11855: of a dense feed-forward that was split into experts.

Axis legend: T tokens, E experts, D model width.
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
from dynmoe_jax.routing.router import OUTPUTS


@LOSSES.register("imitation")
@dataclasses.dataclass(frozen=True)
class Imitation(RoutingLoss):
    """KL of P from softmax(label), the label 1 for the k experts nearest to their share of all.

    That share is k/E of what all experts give together, and k how many the router aims at.  All
    together are the teacher: the dense feed-forward, as long as they are frozen
    (``config.train.trainable='router'``).  Costs what all experts cost, for every token.
    """

    weight: float = weight_setting(help="of the imitation of an oracle (FactorLLM uses 0.05)")
    controller: str = controller_setting()
    label = "imitation"
    needs = frozenset({"logits", "counts", OUTPUTS})

    def sums(self, routing, given, params):
        """Divergences."""
        label_TE = jax.nn.log_softmax(labels(given, routing.num_experts).astype(jnp.float32))
        log_p_TE = jax.nn.log_softmax(routing.logits_TE[..., : routing.num_experts])
        divergence_T1 = jnp.sum(jnp.exp(log_p_TE) * (log_p_TE - label_TE), axis=-1, keepdims=True)
        return {"divergence": over_tokens(divergence_T1, given.valid_T)[..., 0]}

    def value(self, sums, tokens):
        """The mean."""
        return sums["divergence"] / tokens


def labels(given, experts: int):
    """Whether each expert is among the k nearest, [T, E]; it carries no gradient."""
    k = max(1, round(given.expected))

    def output(e):
        return jax.lax.stop_gradient(given.output(e)).astype(jnp.float32)

    def add(e, total_TD):
        return total_TD + output(e)

    first_TD = output(0)
    share_TD = k / experts * jax.lax.fori_loop(1, experts, add, first_TD)
    numbers_E = jnp.arange(experts)
    distance_ET = jax.lax.map(
        lambda e: jnp.sum(jnp.square(output(e) - share_TD), axis=-1), numbers_E
    )
    _, nearest_TK = jax.lax.top_k(-distance_ET.T, min(k, experts))
    return jnp.any(nearest_TK[..., None] == numbers_E, axis=-2)
