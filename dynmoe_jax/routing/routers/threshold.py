"""D2DMoE: as many experts as give a token much (arXiv 2310.04361).

Of a dense feed-forward that is split into experts, a router of two layers foretells how long each
expert's output will be; those far shorter than the longest are left out.  It is fitted
(``python -m dynmoe_jax.surgery fit_norms``), not trained.

Axis legend: T tokens, E experts, K slots per token, D model width, U hidden units of the router.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import (
    Routing,
    alive,
    fill_slots,
    masked_logits,
    straight_through,
)
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput

RULES = ("largest", "cumulative", "fixed")
SENSES = ("paper", "released")


@ROUTERS.register("threshold")
@dataclasses.dataclass(frozen=True)
class Threshold(Router):
    """A token takes the experts whose score is at least a share of its largest, each weighed by 1.

    Scores are the absolute outputs of a net of two layers, ReLU between them.  Which experts are
    taken is chosen when evaluating or generating, and no part of the model: those of a share of
    the largest score, the fewest that hold a share of all scores, or a fixed number.  With all
    experts, a feed-forward that was split computes what it did before.
    """

    tau: float = free_setting(
        0.1,
        "share of the largest score, or with cumulative of all scores",
        low=0.0,
        high=1.0,
        only_with={"rule": ("largest", "cumulative")},
        per_layer=True,
    )
    rule: str = free_setting(
        "largest",
        "experts of a token: those of scores from tau times the largest on; the fewest whose "
        "scores are tau of all; or k of the largest scores, as a control",
        choices=RULES,
    )
    sense: str = free_setting(
        "paper",
        "experts are taken from tau times the largest score on, or, as in the released code, from "
        "1 - tau times it on",
        choices=SENSES,
        only_with={"rule": ("largest",)},
    )
    k: int = free_setting(
        2, "experts per token", unit="experts", low=1, only_with={"rule": ("fixed",)}
    )
    hidden_width: int = model_setting(128, "hidden units of the router", unit="units", low=1)
    losses: ClassVar = {"balance": 0.0}
    gives = frozenset({"distribution", "logits", "counts"})

    @property
    def share(self) -> float:
        """Share of the largest score that an expert has to have; of the rule ``largest``."""
        return self.tau if self.sense == "paper" else 1.0 - self.tau

    @property
    def takes_all(self) -> bool:
        """Whether every token uses every expert, of any number of them."""
        return {"largest": self.share == 0, "cumulative": self.tau == 1}.get(self.rule, False)

    def describe(self) -> str:
        """Names the rule."""
        return {
            "largest": f"scores from {self.share:g} of the largest on",
            "cumulative": f"the largest scores, {self.tau:g} of all",
            "fixed": f"the {self.k} largest scores",
        }[self.rule]

    def advice(self, wish: str) -> str:
        """Names what may change without training."""
        if wish == "balance":
            return super().advice(wish)
        fewer = wish == "fewer"
        if self.rule == "fixed":
            return f"{'lower' if fewer else 'raise'} config.model.moe.threshold.k"
        raised = fewer == (self.rule == "largest" and self.sense == "paper")
        return f"{'raise' if raised else 'lower'} config.model.moe.threshold.tau"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts at most; expected as if scores were even from 0 to the largest."""
        if self.rule == "fixed":
            return Bounds(self.k, self.k, float(self.k), float(self.k))
        share = 1 - self.share if self.rule == "largest" else 1 - math.sqrt(1 - self.tau)
        expected = 1 + (num_experts - 1) * share
        fewest = num_experts if self.takes_all else 1
        return Bounds(num_experts, fewest, expected, expected)

    def parameters(self, width: int, num_experts: int) -> dict[str, Parameter]:
        """Two matrices, with a bias each."""
        units = self.hidden_width
        return {
            "router_in_DU": Parameter((width, units)),
            "router_in_bias_U": Parameter((units,), init="zeros", decay=False),
            "router_out_UE": Parameter((units, num_experts)),
            "router_out_bias_E": Parameter((num_experts,), init="zeros", decay=False),
        }

    def logits(self, params, x_TD: Float[Array, "T D"], num_experts: int) -> Float[Array, "T E"]:
        """Outputs of the net, float32; scores are the absolute values."""
        exact = jax.lax.Precision.HIGHEST
        inner_TU = jnp.matmul(x_TD.astype(jnp.float32), params["router_in_DU"], precision=exact)
        hidden_TU = jax.nn.relu(inner_TU + params["router_in_bias_U"])
        outer_TE = jnp.matmul(hidden_TU, params["router_out_UE"], precision=exact)
        return outer_TE + params["router_out_bias_E"]

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the order of choice is that of the scores, from the largest down."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        score_TE = jnp.where(alive(logits_TE), jnp.abs(logits_TE), 0.0)
        experts = logits_TE.shape[-1]
        # Tokens whose scores are all 0, such as padding, have even ones.
        total_T1 = jnp.sum(score_TE, axis=-1, keepdims=True)
        some_T1 = total_T1 > 0
        probs_TE = jnp.where(some_T1, score_TE / jnp.where(some_T1, total_T1, 1.0), 1.0 / experts)
        slots = self.bounds(experts).slots
        # Dead experts stand behind those of score 0.
        ranked_TE = jnp.where(alive(logits_TE), score_TE, -1.0)
        best_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(ranked_TE), slots)
        keep_TK = given.valid_T[:, None] & (best_TK >= 0) & self._kept(best_TK)
        routing = fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=False)
        return straight_through(routing)

    def _kept(self, best_TK: Float[Array, "T K"]) -> Bool[Array, "T K"]:
        """Whether the experts of the largest scores, in this order, are used."""
        if self.rule == "fixed" or self.takes_all:
            return jnp.ones(best_TK.shape, bool)
        if self.rule == "largest":
            return best_TK >= self.share * best_TK[:, :1]
        score_TK = jnp.maximum(best_TK, 0.0)
        before_TK = jnp.cumsum(score_TK, axis=-1) - score_TK
        first_K = jnp.arange(best_TK.shape[-1]) == 0
        return first_K | (before_TK < self.tau * jnp.sum(score_TK, axis=-1, keepdims=True))
