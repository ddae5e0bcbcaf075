"""Top-P dynamic routing: harder tokens use more experts (arXiv 2403.07652, section 2.2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.quantiles import histogram, quantile
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput

EXPECTED_EXPERTS = 1.76
"""Mean experts of a token that the paper reports for its trained model (table 2;
docs/measurements.md: paper-experts-per-token)."""

USUAL_ROWS = 2.0
"""Rows per token that memory is laid out for: a bit over the paper's mean."""


def top_p_slots(num_experts: int, threshold: float) -> int:
    """The most experts that one token can need: floor(p E) + 1, at most E.

    The m most probable experts hold at least m/E of the mass, so the mass before slot m = floor(p
    E) + 1 (counted from 0) already exceeds p.  E = 16 and p = 0.4 need 7 slots, not 16.
    """
    # The comparison runs in float32: on its threshold, and with room for what float32 sums lose
    # (E = 25, p = 0.08: two even probabilities sum up to p, not to more, and a third is needed).
    room = num_experts * 2**-20
    return min(num_experts, math.floor(float(np.float32(threshold)) * num_experts + room) + 1)


@ROUTERS.register("top_p")
@dataclasses.dataclass(frozen=True)
class TopP(Router):
    """A token takes its most probable experts until their cumulative probability passes p.

    The expert that crosses the threshold is included, so a token uses at least one.  An expert is
    taken while the mass *before* it is <= p, which is the strict ``>`` of the released code; the
    paper's ``>=`` differs at exact equality alone.
    """

    threshold: float = model_setting(
        0.4,
        "a token adds experts until their probabilities pass this (p)",
        above=0.0,
        high=1.0,
        formerly=("model.moe.top_p",),
        per_layer=True,
    )
    renormalize: bool = model_setting(
        False,
        "divide the combine weights by their sum (the paper does not)",
        formerly=("model.moe.renormalize",),
    )

    experts_per_token: float = model_setting(
        0.0,
        "budget: p moves so that tokens use so many experts on average, over all layers with as "
        "many experts; 0 = none, p stays the threshold",
        unit="experts",
        low=0.0,
    )
    max_threshold: float = model_setting(
        0.7, "largest p that a budget may come to", above=0.0, high=1.0
    )

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where no p gives so many experts."""
        budget = self.experts_per_token
        if budget and not 1 <= budget <= num_experts:
            return (
                f"experts_per_token={budget:g} must be 0, or 1 to "
                f"config.model.moe.num_experts={num_experts}"
            )
        return None

    def describe(self) -> str:
        """Names the rule."""
        if self.experts_per_token:
            return f"top-p with a budget of {self.experts_per_token:g}"
        return f"top-p {self.threshold:g}"

    def advice(self, wish: str) -> str:
        """Names the entropy loss, the learning rate and the threshold."""
        p = f"config.model.moe.top_p.threshold={self.threshold:g}"
        if wish == "balance":
            return super().advice(wish)
        if wish == "fewer":
            return (
                "raise config.loss.entropy.weight or config.optimizer.learning_rate, or lower " + p
            )
        return f"lower config.loss.entropy.weight, raise config.loss.balance.weight, or raise {p}"

    def bounds(self, num_experts: int) -> Bounds:
        """K of :func:`top_p_slots`, and what the paper's model uses."""
        if budget := self.experts_per_token:
            slots = top_p_slots(num_experts, max(self.threshold, self.max_threshold))
            return Bounds(slots, 1, budget, budget + 0.25)
        slots = top_p_slots(num_experts, self.threshold)
        return Bounds(slots, 1, min(EXPECTED_EXPERTS, num_experts), USUAL_ROWS)

    def initial_state(self, num_experts: int):
        """The threshold, where a budget moves it."""
        return {"threshold": jnp.float32(self.threshold)} if self.experts_per_token else {}

    def shown(self, state):
        """p, where a budget moves it."""
        return dict(state)

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        valid_T = given.valid_T
        probs_TE, logits_TE = softmax_scores(given.logits_TE, valid_T)
        slots = self.bounds(probs_TE.shape[-1]).slots
        sorted_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), slots)
        # Shifted, not "cumsum minus own": the threshold is compared with the very sums that the
        # released code compares with.
        mass_TK = jnp.cumsum(sorted_TK, axis=-1)
        mass_before_TK = jnp.pad(mass_TK[:, :-1], ((0, 0), (1, 0)))
        threshold = given.state.get("threshold", self.threshold)
        keep_TK = (mass_before_TK <= threshold) & valid_T[:, None]
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)

    def measure(self, params, given: RouterInput, routing: Routing):
        """Histogram of the cumulative probabilities before the last expert's, for the budget."""
        if not self.experts_per_token:
            return {}
        sorted_TE = -jnp.sort(-jax.lax.stop_gradient(routing.probs_TE), axis=-1)
        mass_TM = jnp.cumsum(sorted_TE, axis=-1)[:, :-1]
        return {"mass_B": histogram(mass_TM, given.valid_T)}

    def next_state(self, params_N, state_N, seen_N):
        """The p that would have kept the budget in this batch, over all layers.

        A token uses 1 + #{m < E : mass of its m most probable experts <= p}, so the mean is the
        budget a where p is the (a - 1) / (E - 1) quantile of those masses: no gains to tune.
        """
        if not self.experts_per_token:
            return state_N, None
        # Of many layers together more than 32 bits count.
        count_B = jnp.sum(seen_N["mass_B"].astype(jnp.float32), axis=0)
        experts = params_N["router_DE"].shape[-1]
        p = quantile(count_B, (self.experts_per_token - 1) / max(experts - 1, 1))
        p = jnp.clip(p, 0.0, self.max_threshold)
        # A batch of padding alone says nothing.
        p_N = jnp.where(jnp.sum(count_B) > 0, p, state_N["threshold"])
        return {"threshold": p_N}, None
