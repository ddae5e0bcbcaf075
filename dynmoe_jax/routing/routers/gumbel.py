"""Sampled top-1: Gumbel-softmax weights in training, the most probable expert at inference.

The "sample top-1" of Branch-Train-MiX (arXiv 2403.07816), by the relaxation of a draw of Jang et
al. (arXiv 1611.01144).

Axis legend: T tokens, E experts, K slots per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("gumbel")
@dataclasses.dataclass(frozen=True)
class Gumbel(Router):
    """All experts in training, weighed by a relaxed draw of one; at inference the probable one.

    The weights of training are softmax((logits + G) / tau), G of the standard Gumbel distribution:
    the largest falls on an expert as often as its probability says, and has the more the less tau
    is, which falls by one factor in every step.  At inference the weight is 1.
    """

    temperature: float = free_setting(1.0, "tau of the first step of training", above=0.0)
    last_temperature: float = free_setting(0.1, "tau that it falls to", above=0.0)
    falls_for: int = free_setting(
        250, "steps of training in which tau falls, each by one factor", unit="steps", low=1
    )
    reads = frozenset({"noise", "step"})
    losses: ClassVar = {"router_z": 0.0}

    def describe(self) -> str:
        """Names the rule."""
        return "sampled top-1 by Gumbel-softmax,"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts, which training uses; inference uses one."""
        return Bounds(num_experts, 1, float(num_experts), float(num_experts))

    def tau(self, step: Array | None) -> Array | float:
        """Temperature of a step of training."""
        if step is None:
            return self.temperature
        fallen = jnp.minimum(step / self.falls_for, 1.0)
        return self.temperature * (self.last_temperature / self.temperature) ** fallen

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the expert of the largest weight first."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        if not given.training:
            _, expert_T1 = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), 1)
            kept_T1 = given.valid_T[:, None]
            return fill_slots(probs_TE, logits_TE, expert_T1, kept_T1, renormalize=True)
        experts = logits_TE.shape[-1]
        noise_TE = 0.0
        if given.key_T is not None:
            noise_TE = given.draws(lambda key: jax.random.gumbel(key, (experts,)))
        drawn_TE = jax.nn.softmax((logits_TE + noise_TE) / self.tau(given.step), axis=-1)
        expert_TK = jnp.argsort(-jax.lax.stop_gradient(drawn_TE), axis=-1)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        routing = fill_slots(drawn_TE, logits_TE, expert_TK, keep_TK, renormalize=False)
        return dataclasses.replace(routing, probs_TE=probs_TE)
