"""Top-P dynamic routing: harder tokens use more experts (arXiv 2403.07652, section 2.2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.fields import free_setting, model_setting, setting, without_idle
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.budget import RULES, Budget
from dynmoe_jax.routing.normalize import normalized_logits
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits, straight_through
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput

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
        only_with={"straight_through": (False,)},
    )
    straight_through: bool = model_setting(
        False,
        "the combine weights are 1, with the gradient of the probabilities, for experts that are "
        "parts of a dense feed-forward",
    )
    min_experts: int = model_setting(
        1, "experts that a token uses at the least", unit="experts", low=1
    )
    max_experts: int = model_setting(
        0, "experts that a token uses at the most; 0 = as many as p asks for", unit="experts", low=0
    )
    normalize_logits: bool = model_setting(
        False,
        "standardize the logits of each token and scale them by a factor that each layer learns "
        "(DTop-p)",
    )
    logit_scale: float = model_setting(
        1.0, "that factor in a new model (theta)", above=0.0, only_with={"normalize_logits": ()}
    )
    experts_per_token: float = setting(
        0.0,
        "budget: p moves so that tokens use so many experts on average, over all layers with as "
        "many experts; 0 = none, p stays the threshold",
        defines_model=True,
        fixed_in_run=False,
        unit="experts",
        low=0.0,
    )
    budget_rule: str = model_setting(
        "quantile",
        "how p is moved: to the quantile that would have held the budget in the last batch, or by "
        "a proportional-integral controller",
        choices=RULES,
        only_with={"experts_per_token": ()},
    )
    max_threshold: float = model_setting(
        0.7,
        "largest p that a budget may come to",
        above=0.0,
        high=1.0,
        only_with={"experts_per_token": ()},
    )
    proportional_gain: float = free_setting(
        0.5,
        "p per error of the newest batch, in shares of the experts (K_p)",
        low=0.0,
        only_with={"budget_rule": ("proportional_integral",)},
    )
    integral_gain: float = free_setting(
        0.5,
        "p per sum of errors (K_i); without normalize_logits more than 0.5 may oscillate",
        low=0.0,
        only_with={"budget_rule": ("proportional_integral",)},
    )

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where no p gives so many experts."""
        if obstacle := super().obstacle(num_experts):
            return obstacle
        fewest, most, budget = self.min_experts, self.max_experts, self.experts_per_token
        of_experts = f"config.model.moe.num_experts={num_experts}"
        if most and fewest > most:
            return f"min_experts={fewest} must be at most max_experts={most}"
        if budget and not fewest <= budget <= (most or num_experts):
            least = "1" if fewest == 1 else f"min_experts={fewest}"
            return (
                f"experts_per_token={budget:g} must be 0, or {least} to "
                f"{f'max_experts={most}' if most else of_experts}"
            )
        reached = max(top_p_slots(num_experts, self.max_threshold), fewest)
        if budget > reached:
            return (
                f"experts_per_token={budget:g} must be at most {reached}, as many of {of_experts} "
                f"as max_threshold={self.max_threshold:g} allows"
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
        fewest, budget = self.min_experts, self.experts_per_token
        highest = max(self.threshold, self.max_threshold) if budget else self.threshold
        slots = max(top_p_slots(num_experts, highest), fewest)
        slots = min(slots, self.max_experts or num_experts)
        if budget:
            return Bounds(slots, fewest, budget, min(budget + 0.25, slots))
        expected, usual = max(EXPECTED_EXPERTS, fewest), max(USUAL_ROWS, fewest)
        return Bounds(slots, fewest, min(expected, slots), min(usual, slots))

    def parameters(self, width: int, num_experts: int) -> dict[str, Parameter]:
        """The matrix, and the scale of normalized logits."""
        declared = super().parameters(width, num_experts)
        if self.normalize_logits:
            init = lambda key, shape: jnp.full(shape, self.logit_scale)  # noqa: E731
            declared["logit_scale"] = Parameter((), init, decay=False)
        return declared

    def initial_state(self, num_experts: int):
        """The threshold, and what its rule needs, where a budget moves it."""
        return self._budget(num_experts).initial() if self.experts_per_token else {}

    def shown(self, state):
        """p, where a budget moves it."""
        return dict(state)

    def frozen(self, state_N):
        """Top-p of the p that a budget has come to, without the budget."""
        if not self.experts_per_token:
            return self
        p, *others = set(map(float, state_N["threshold"]))
        if others:
            return None
        # A threshold is above 0; the mass before a second expert is at least 1 / E.
        p = max(p, float(np.finfo(np.float32).tiny))
        return without_idle(dataclasses.replace(self, threshold=p, experts_per_token=0.0))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        valid_T = given.valid_T
        logits_TE = masked_logits(given.logits_TE, valid_T)
        if self.normalize_logits:
            logits_TE = normalized_logits(logits_TE, params.get("logit_scale", self.logit_scale))
        probs_TE = jax.nn.softmax(logits_TE, axis=-1)
        slots = self.bounds(probs_TE.shape[-1]).slots
        sorted_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), slots)
        # Shifted, not "cumsum minus own": the threshold is compared with the very sums that the
        # released code compares with.
        mass_TK = jnp.cumsum(sorted_TK, axis=-1)
        mass_before_TK = jnp.pad(mass_TK[:, :-1], ((0, 0), (1, 0)))
        threshold = given.state.get("threshold", self.threshold)
        keep_TK = mass_before_TK <= threshold
        if self.min_experts > 1:
            keep_TK |= jnp.arange(slots) < self.min_experts
        keep_TK &= valid_T[:, None]
        routing = fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)
        return straight_through(routing) if self.straight_through else routing

    def measure(self, params, given: RouterInput, routing: Routing):
        """Sums for the budget."""
        if not self.experts_per_token:
            return {}
        return self._budget(routing.num_experts).measure(given, routing)

    def next_state(self, params_N, state_N, seen_N):
        """The p of the budget's rule, over all layers."""
        if not self.experts_per_token:
            return state_N, None
        return self._budget(params_N["router_DE"].shape[-1]).next(state_N, seen_N), None

    def _budget(self, num_experts: int) -> Budget:
        return RULES[self.budget_rule](
            self.experts_per_token,
            num_experts,
            self.min_experts,
            self.max_experts or num_experts,
            start=self.threshold,
            highest=self.max_threshold,
            gains=(self.proportional_gain, self.integral_gain),
        )
