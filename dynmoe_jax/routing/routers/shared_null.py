"""One null logit in many slots: a threshold of each token's own (arXiv 2601.15370).

The null logit stands for M = E (1 - rho) / rho null experts, which are never made: the k largest of
E + M logits hold as many experts as have a larger one than the null logit.

Axis legend: T tokens, E experts, M null slots, K = k slots per token.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.losses.free_balance import with_null_group
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("shared_null")
@dataclasses.dataclass(frozen=True)
class SharedNull(Router):
    """A token uses r = clip(#{e : z_e > z_null}, max(0, k - M), k) experts, the best ones.

    Their probabilities are divided by their sum, so the null logit decides the number alone.
    """

    k: int = model_setting(
        2, "experts per token, null slots included", unit="experts", low=1, per_layer=True
    )
    density: float = model_setting(
        0.5,
        "share of the slots that hold an expert where all are as busy (rho), so tokens use k rho "
        "on average; below 0.5 training is less stable",
        low=0.01,
        high=1.0,
    )
    losses: ClassVar = {"free_balance": 2e-2, "router_z": 1e-3}
    gives = Router.gives | {"choices_TJ", "shares_TJ"}
    free_experts = 1

    def nulls(self, num_experts: int) -> int:
        """M, rounded; one at the least."""
        return max(1, round(num_experts * (1 - self.density) / self.density))

    def describe(self) -> str:
        """Names the rule."""
        return f"top-{self.k} with a null logit, {self.density:.0%} of the slots in use"

    def advice(self, wish: str) -> str:
        """Names the loss, and the density."""
        if wish == "balance":
            return "raise config.loss.free_balance.weight"
        change = "lower" if wish == "fewer" else "raise"
        return f"{change} config.model.moe.shared_null.density={self.density:g}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and k rho on average."""
        fewest = max(0, self.k - self.nulls(num_experts))
        expected = max(self.k * self.density, float(fewest))
        return Bounds(self.k, fewest, expected, min(float(self.k), expected + 0.25))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the last column of scores is that of all null slots together."""
        logits_TS = masked_logits(given.logits_TE, given.valid_T)
        logits_TE, null_T1 = logits_TS[:, :-1], logits_TS[:, -1:]
        nulls = self.nulls(logits_TE.shape[-1])
        # The softmax over M equal logits more: e^(z + log M) is what they add up to.
        logits_TS = jnp.append(logits_TE, null_T1 + math.log(nulls), axis=-1)
        probs_TS = jax.nn.softmax(logits_TS, axis=-1)
        best_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), self.k)
        above_TK = (best_TK > null_T1) | (jnp.arange(self.k) < self.k - nulls)
        keep_TK = above_TK & given.valid_T[:, None]
        routing = fill_slots(
            probs_TS, logits_TS, expert_TK, keep_TK, renormalize=True, free_experts=1
        )
        null_T = jnp.where(given.valid_T, self.k - routing.experts_per_token_T, 0)
        return with_null_group(routing, null_T, nulls)
