"""Top-P dynamic routing: harder tokens use more experts (arXiv 2403.07652, section 2.2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
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

    def describe(self) -> str:
        """Names the rule."""
        return f"top-p {self.threshold:g}"

    def advice(self, wish: str) -> str:
        """Names the entropy loss, the learning rate and the threshold."""
        p = f"config.model.moe.top_p.threshold={self.threshold:g}"
        if wish == "fewer":
            return (
                "raise config.loss.entropy.weight or config.optimizer.learning_rate, or lower " + p
            )
        return f"lower config.loss.entropy.weight, raise config.loss.balance.weight, or raise {p}"

    def bounds(self, num_experts: int) -> Bounds:
        """K of :func:`top_p_slots`, and what the paper's model uses."""
        slots = top_p_slots(num_experts, self.threshold)
        return Bounds(slots, 1, min(EXPECTED_EXPERTS, num_experts), USUAL_ROWS)

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        valid_T = given.valid_T
        probs_TE, logits_TE = softmax_scores(given.logits_TE, valid_T)
        slots = top_p_slots(probs_TE.shape[-1], self.threshold)
        sorted_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), slots)
        # Shifted, not "cumsum minus own": the threshold is compared with the very sums that the
        # released code compares with.
        mass_TK = jnp.cumsum(sorted_TK, axis=-1)
        mass_before_TK = jnp.pad(mass_TK[:, :-1], ((0, 0), (1, 0)))
        keep_TK = (mass_before_TK <= self.threshold) & valid_T[:, None]
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)
