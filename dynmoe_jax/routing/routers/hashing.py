"""Hash routing: the experts of a token follow from its id (arXiv 2106.04426).

Nothing is learned, so it is the control of every analysis of routers.

Axis legend: T tokens, E experts, K = k slots per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing
from dynmoe_jax.routing.router import Bounds, Router, RouterInput, no_logits


@ROUTERS.register("hash")
@dataclasses.dataclass(frozen=True)
class Hash(Router):
    """A token takes k experts, E // k apart, from a hash of its id on, each weighed by 1/k."""

    k: int = model_setting(1, "experts per token", unit="experts", low=1, per_layer=True)
    reads = frozenset({"token_ids"})
    losses: ClassVar = {"balance": 0.0}
    gives = frozenset({"distribution", "counts"})

    def describe(self) -> str:
        """Names the rule."""
        return f"hash of the token id, {self.k} experts"

    def advice(self, wish: str) -> str:
        """Says that nothing is learned."""
        return "choose a router that learns"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less."""
        return Bounds(self.k, self.k, float(self.k), float(self.k))

    def parameters(self, width: int, num_experts: int):
        """None."""
        return {}

    def logits(self, params, x_TD, num_experts):
        """Zeros."""
        return no_logits(num_experts, x_TD)

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens by their ids."""
        experts = given.logits_TE.shape[-1]
        hash_T = _mixed(given.token_id_T.astype(jnp.uint32)) % experts
        expert_TK = (hash_T[:, None] + (experts // self.k) * jnp.arange(self.k)) % experts
        expert_TK = jnp.where(given.valid_T[:, None], expert_TK, experts).astype(jnp.int32)
        used_TK = (expert_TK < experts).astype(jnp.float32)
        probs_TE = jnp.sum(jax.nn.one_hot(expert_TK, experts), axis=1) / self.k
        return Routing(expert_TK, used_TK / self.k, probs_TE, given.logits_TE, experts)


def _mixed(id_T):
    """A 32-bit hash in which every bit depends on every bit (MurmurHash3's finalizer)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        id_T = (id_T ^ (id_T >> shift)) * jnp.uint32(factor)
    return id_T ^ (id_T >> 16)
