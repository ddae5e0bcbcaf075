"""Auxiliary-loss-free load balancing: sigmoid scores, and a bias that only the choice sees.

Loss-free balancing (arXiv 2408.15664), the router of DeepSeek-V3 (arXiv 2412.19437).

Axis legend: T tokens, E experts, K = k slots per token, N MoE layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("sigmoid_bias")
@dataclasses.dataclass(frozen=True)
class SigmoidBias(Router):
    """A token takes the k experts of the largest s + b, weighed by s over their sum.

    After every update, b_e grows by a fixed step for experts that got fewer tokens of the batch
    than the mean, and shrinks for those that got more.  b carries no gradient.
    """

    k: int = model_setting(2, "experts per token", unit="experts", low=1, per_layer=True)
    rate: float = free_setting(1e-3, "step of the bias after an update (u); 0 freezes it", low=0.0)
    losses: ClassVar = {"balance": 0.0}
    gives = frozenset({"distribution", "logits", "counts"})

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where a token cannot have k experts."""
        if self.k > num_experts:
            return f"k={self.k} must be at most config.model.moe.num_experts={num_experts}"
        return None

    def describe(self) -> str:
        """Names the rule."""
        return f"top-{self.k} of sigmoid scores with a balancing bias"

    def advice(self, wish: str) -> str:
        """Names the step of the bias; the number of experts is fixed."""
        return "raise config.model.moe.sigmoid_bias.rate"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less."""
        return Bounds(self.k, self.k, float(self.k), float(self.k))

    def initial_state(self, num_experts: int):
        """A bias of zero."""
        return {"bias_E": jnp.zeros(num_experts, jnp.float32)}

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` are the scores over their sum."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        score_TE = jax.nn.sigmoid(logits_TE)
        biased_TE = jax.lax.stop_gradient(score_TE) + given.state["bias_E"]
        _, expert_TK = jax.lax.top_k(biased_TE, self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        routing = fill_slots(score_TE, logits_TE, expert_TK, keep_TK, renormalize=True)
        probs_TE = score_TE / jnp.sum(score_TE, axis=-1, keepdims=True)
        return dataclasses.replace(routing, probs_TE=probs_TE)

    def measure(self, params, given, routing):
        """Tokens of each expert."""
        return {"load_E": routing.load_E}

    def next_state(self, params_N, state_N, seen_N):
        """b + u sign(mean load - load), with sign(0) = 0."""
        load_NE = seen_N["load_E"].astype(jnp.float32)
        missing_NE = jnp.mean(load_NE, axis=-1, keepdims=True) - load_NE
        return {"bias_E": state_N["bias_E"] + self.rate * jnp.sign(missing_NE)}, None
