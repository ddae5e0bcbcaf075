"""DS-MoE: all experts in training, few at inference (arXiv 2404.05567).

Axis legend: T tokens, E experts, K slots per token.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("dense")
@dataclasses.dataclass(frozen=True)
class Dense(Router):
    """All experts in training, weighed by their probabilities; at inference the probable ones.

    How many those are is chosen when evaluating or generating, and no part of the model: k of them,
    or all from a probability on, or, with neither, all.
    """

    k: int = free_setting(
        0, "experts per token at inference; 0 = all", unit="experts", low=0, per_layer=True
    )
    threshold: float = free_setting(
        0.0,
        "at inference a token uses the experts that are at least as probable (epsilon); 0 = all",
        low=0.0,
        high=1.0,
        per_layer=True,
    )
    losses: ClassVar = {"mutual_information": 1e-2, "router_z": 0.0}

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where both settings choose."""
        if self.k and self.threshold:
            return f"threshold={self.threshold:g} must be 0 where k={self.k} says how many"
        return super().obstacle(num_experts)

    def describe(self) -> str:
        """Names the rule."""
        few = f"top-{self.k}" if self.k else f"probabilities from {self.threshold:g} on"
        return f"dense, {few if self.k or self.threshold else 'all'} at inference,"

    def advice(self, wish: str) -> str:
        """Names the loss; in training all experts are used."""
        if wish == "balance":
            return "raise config.loss.mutual_information.weight"
        return "set config.model.moe.dense.k when generating or evaluating"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts: those of training, which inference may have fewer than."""
        return Bounds(num_experts, num_experts, float(num_experts), float(num_experts))

    def slots(self, num_experts: int, training: bool) -> int:
        """K: fewer where a token provably needs no more."""
        if training:
            return num_experts
        if self.threshold:
            # At most 1 / epsilon experts are that probable, with room for what float32 loses.
            return min(num_experts, math.floor((1 + 2**-16) / self.threshold))
        return self.k or num_experts

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the most probable experts first."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        slots = self.slots(probs_TE.shape[-1], given.training)
        top_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), slots)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        if self.threshold and not given.training:
            keep_TK &= top_TK >= self.threshold
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=False)
