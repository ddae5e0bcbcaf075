"""Top-k routing: Switch (k = 1, arXiv 2101.03961), GShard style (k = 2, arXiv 2006.16668)."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(Router):
    """Every token takes its k most probable experts, weighed by their probabilities."""

    k: int = model_setting(
        2, "experts per token", unit="experts", low=1, formerly=("model.moe.top_k",), per_layer=True
    )
    renormalize: bool = model_setting(
        False,
        "divide the combine weights by their sum (GShard, Mixtral)",
        formerly=("model.moe.renormalize",),
    )

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where a token cannot have k experts."""
        if self.k > num_experts:
            return f"k={self.k} must be at most config.model.moe.num_experts={num_experts}"
        return None

    def describe(self) -> str:
        """Names the rule."""
        return f"top-{self.k}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less."""
        return Bounds(self.k, self.k, float(self.k), float(self.k))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)
