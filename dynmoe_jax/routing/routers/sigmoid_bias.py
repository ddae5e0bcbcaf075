"""Auxiliary-loss-free load balancing: scores of each expert by itself, and a bias that only the
choice sees.

Loss-free balancing (arXiv 2408.15664), the router of DeepSeek-V3 (arXiv 2412.19437), and quantile
balancing (arXiv 2607.24653).

Axis legend: T tokens, E experts, G groups of experts, K = k slots per token, N MoE layers, B bins.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.quantiles import histograms, quantile
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Router, RouterInput

_LEAST_LOGIT = -40.0
"""Scores of lower logits are that of this one: a token whose scores all were 0 would have no shares
of them, and neither these nor the root a slope."""


def _sigmoid(logits_TE):
    return jax.nn.sigmoid(jnp.maximum(logits_TE, _LEAST_LOGIT))


def _sqrt_softplus(logits_TE):
    return jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_TE, _LEAST_LOGIT)))


_SCORES = {"sigmoid": _sigmoid, "sqrt_softplus": _sqrt_softplus}
_LARGEST = {"sigmoid": 1.0, "sqrt_softplus": 4.0}
"""Scores, and what none is above; sqrt(softplus(z)) passes 4 where z does 16."""


@ROUTERS.register("sigmoid_bias")
@dataclasses.dataclass(frozen=True)
class SigmoidBias(Router):
    """A token takes the k experts of the largest s + b, weighed by s over their sum.

    After every update, b_e grows for experts that got fewer tokens of the batch than the mean, and
    shrinks for those that got more: by a fixed step, in proportion to the relative difference, or
    at once to where the batch would have been even (``"quantile"``).  b carries no gradient.

    With groups, experts are divided into G groups side by side, each scored by the sum of its k / M
    largest s + b, and a token chooses among the experts of the M best groups.
    """

    k: int = model_setting(2, "experts per token", unit="experts", low=1, per_layer=True)
    score: str = model_setting(
        "sigmoid",
        "score of a logit (s); sqrt_softplus = sqrt(log(1 + e^z))",
        choices=tuple(_SCORES),
    )
    groups: int = model_setting(1, "groups that experts are divided into (G)", low=1)
    groups_chosen: int = model_setting(
        0, "groups among whose experts a token chooses (M); 0 = all", low=0
    )
    update_rule: str = free_setting(
        "sign",
        "how the bias moves; mean_of_quantiles = the mean of the quantiles of devices and "
        "microbatches (as Megatron-LM), not that of the whole batch",
        choices=("sign", "proportional", "quantile", "mean_of_quantiles"),
    )
    rate: float = free_setting(
        1e-3,
        "step of the bias after an update by sign, gain of one in proportion (u); 0 freezes it",
        low=0.0,
        only_with={"update_rule": ("sign", "proportional")},
    )
    losses: ClassVar = {"balance": 0.0}
    gives = frozenset({"distribution", "logits", "counts"})

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where groups are not even, or do not have k experts."""
        if obstacle := super().obstacle(num_experts):
            return obstacle
        if num_experts % self.groups:
            return f"groups={self.groups} must divide config.model.moe.num_experts={num_experts}"
        if self.groups_chosen > self.groups:
            return f"groups_chosen={self.groups_chosen} must be at most groups={self.groups}"
        allowed = self.groups_chosen * (num_experts // self.groups)
        if self._limited and self.k > allowed:
            return f"k={self.k} must be at most {allowed}, the experts of the groups chosen"
        if self._limited and self._by_quantile:
            return (
                f"update_rule={self.update_rule} must be sign or proportional where groups are "
                "chosen"
            )
        return None

    def describe(self) -> str:
        """Names the rule."""
        among = f", of {self.groups_chosen} of {self.groups} groups" if self._limited else ""
        return f"top-{self.k} of {self.score} scores with a balancing bias{among}"

    def advice(self, wish: str) -> str:
        """Names the step of the bias; the number of experts is fixed."""
        return "raise config.model.moe.sigmoid_bias.rate"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less."""
        return Bounds(self.k, self.k, float(self.k), float(self.k))

    def initial_state(self, num_experts: int):
        """A bias of zero."""
        return {"bias_E": jnp.zeros(num_experts, jnp.float32)}

    def shown(self, state):
        """The smallest and the largest bias."""
        return {"bias_min": jnp.min(state["bias_E"]), "bias_max": jnp.max(state["bias_E"])}

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` are the scores over their sum."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        score_TE = _SCORES[self.score](logits_TE)
        biased_TE = jax.lax.stop_gradient(score_TE) + given.state["bias_E"]
        if self._limited:
            biased_TE = jnp.where(self._allowed(biased_TE), biased_TE, -jnp.inf)
        _, expert_TK = jax.lax.top_k(biased_TE, self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        routing = fill_slots(score_TE, logits_TE, expert_TK, keep_TK, renormalize=True)
        probs_TE = score_TE / jnp.sum(score_TE, axis=-1, keepdims=True)
        return dataclasses.replace(routing, probs_TE=probs_TE)

    def _allowed(self, biased_TE: Float[Array, "T E"]) -> Bool[Array, "T E"]:
        """Whether an expert lies in one of the groups that a token chooses among."""
        tokens, experts = biased_TE.shape
        inside = experts // self.groups
        biased_TGX = biased_TE.reshape(tokens, self.groups, inside)
        best = min(inside, max(1, self.k // self.groups_chosen))
        score_TG = jnp.sum(jax.lax.top_k(biased_TGX, best)[0], axis=-1)
        _, group_TM = jax.lax.top_k(score_TG, self.groups_chosen)
        allowed_TG = jnp.any(group_TM[:, :, None] == jnp.arange(self.groups), axis=1)
        return jnp.repeat(allowed_TG, inside, axis=-1)

    @property
    def _limited(self) -> bool:
        """Whether tokens choose groups first."""
        return 0 < self.groups_chosen < self.groups

    @property
    def _by_quantile(self) -> bool:
        """Whether the bias is set, and not moved."""
        return self.update_rule in ("quantile", "mean_of_quantiles")

    def measure(self, params, given, routing):
        """Tokens of each expert, or what its bias had to be for each token to choose it."""
        if not self._by_quantile:
            return {"load_E": routing.load_E}
        bias_E = given.state["bias_E"]
        score_TE = jax.lax.stop_gradient(_SCORES[self.score](routing.logits_TE))
        # The score that keeps out who is not among the k best.
        best_TK, _ = jax.lax.top_k(score_TE + bias_E, min(self.k + 1, score_TE.shape[-1]))
        needed_TE = best_TK[:, -1:] - score_TE
        if self.update_rule == "quantile":
            low, width = self._range(bias_E)
            return {"needed_EB": histograms((needed_TE - low) / width, given.valid_T)}
        tokens = jnp.sum(given.valid_T, dtype=jnp.int32)
        sorted_TE = jnp.sort(jnp.where(given.valid_T[:, None], needed_TE, jnp.inf), axis=0)
        # An expert's share of the choices, T k / E, needs less; the next token does not.
        at = jnp.minimum(tokens * self.k // score_TE.shape[-1], jnp.maximum(tokens - 1, 0))
        some = tokens > 0
        return {
            "quantile_E": jnp.where(some, sorted_TE[at], 0.0),
            "parts": some.astype(jnp.int32),
        }

    def _range(self, bias_E) -> tuple[Array, Array]:
        """(smallest, range) of what a bias may have to be, given the others."""
        low = jnp.min(bias_E, axis=-1, keepdims=True) - _LARGEST[self.score]
        return low, jnp.max(bias_E, axis=-1, keepdims=True) + _LARGEST[self.score] - low

    def next_state(self, params_N, state_N, seen_N):
        """b + u sign(mean load - load), with sign(0) = 0; b + u (1 - load / mean load); or the
        quantile k / E of the bias that each token needed, less its mean over experts."""
        bias_NE = state_N["bias_E"]
        if not self._by_quantile:
            load_NE = seen_N["load_E"].astype(jnp.float32)
            mean_N1 = jnp.mean(load_NE, axis=-1, keepdims=True)
            moved_NE = jnp.sign(mean_N1 - load_NE)
            if self.update_rule == "proportional":
                moved_NE = (mean_N1 - load_NE) / jnp.maximum(mean_N1, 1e-9)
            return {"bias_E": bias_NE + self.rate * moved_NE}, None
        if self.update_rule == "quantile":
            low_N1, width_N1 = self._range(bias_NE)
            count_NEB = seen_N["needed_EB"]
            experts = bias_NE.shape[-1]

            def of_expert(count_B):
                return quantile(count_B, self.k / experts, upper=True)

            wanted_NE = low_N1 + width_N1 * jax.vmap(jax.vmap(of_expert))(count_NEB)
            some_N1 = jnp.any(count_NEB > 0, axis=(-1, -2))[:, None]
        else:
            wanted_NE = seen_N["quantile_E"] / jnp.maximum(seen_N["parts"], 1)[:, None]
            some_N1 = seen_N["parts"][:, None] > 0
        wanted_NE -= jnp.mean(wanted_NE, axis=-1, keepdims=True)
        # A batch of padding alone says nothing.
        return {"bias_E": jnp.where(some_N1, wanted_NE, bias_NE)}, None
