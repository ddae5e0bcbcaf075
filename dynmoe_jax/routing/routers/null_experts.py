"""AdaMoE: null experts, which compute nothing, beside the others (arXiv 2406.13233).

A token that takes a null expert has a slot less for the others, so tokens differ in what they cost.

Axis legend: T tokens, E experts, M null experts, K = k slots per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.losses.free_balance import with_null_group
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("null_experts")
@dataclasses.dataclass(frozen=True)
class NullExperts(Router):
    """A token takes the k most probable of E + M experts, of which M are null.

    Probabilities are a softmax over all; those of the chosen experts that are not null are divided
    by their sum.  A token with null experts alone gets nothing.
    """

    k: int = model_setting(
        2, "experts per token, null ones included", unit="experts", low=1, per_layer=True
    )
    nulls: int = model_setting(4, "null experts, each with a logit of its own (m)", low=1)
    losses: ClassVar = {"free_balance": 1e-3, "router_z": 0.0}
    gives = Router.gives | {"choices_TJ", "shares_TJ"}

    @property
    def free_experts(self) -> int:
        """M."""
        return self.nulls

    def describe(self) -> str:
        """Names the rule."""
        return f"top-{self.k} with {self.nulls} null experts"

    def advice(self, wish: str) -> str:
        """Names the loss, and the number of null experts."""
        if wish == "balance":
            return "raise config.loss.free_balance.weight"
        change = "raise" if wish == "fewer" else "lower"
        return f"{change} config.model.moe.null_experts.nulls={self.nulls}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and k E / (E + M) where all experts are as busy."""
        expected = self.k * num_experts / (num_experts + self.nulls)
        usual = min(float(self.k), expected + 0.25)
        return Bounds(self.k, max(0, self.k - self.nulls), expected, usual)

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` and ``logits_TE`` end in those of the null experts."""
        probs_TS, logits_TS = softmax_scores(given.logits_TE, given.valid_T)
        _, chosen_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TS), self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], chosen_TK.shape)
        routing = fill_slots(
            probs_TS, logits_TS, chosen_TK, keep_TK, renormalize=True, free_experts=self.nulls
        )
        null_TK = keep_TK & (chosen_TK >= routing.num_experts)
        return with_null_group(routing, jnp.sum(null_TK, axis=-1, dtype=jnp.int32), self.nulls)
