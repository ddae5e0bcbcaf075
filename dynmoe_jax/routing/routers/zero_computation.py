"""LongCat-Flash: identity experts, and a bias that keeps a budget of the others (arXiv 2509.01322).

Axis legend: T tokens, E experts, S = E + identity experts, K = k slots per token, N MoE layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.losses.free_balance import with_groups
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("zero_computation")
@dataclasses.dataclass(frozen=True)
class ZeroComputation(Router):
    """A token takes the k experts of the largest R + b, weighed by R, a softmax over all.

    An identity expert gives the token itself, and its b is 0.  After every update the b of another
    one grows by mu times what its share of the choices lacks of a / (k E), a the budget: at rest
    tokens use a experts on average, each as often as any other.
    """

    k: int = model_setting(
        3, "experts per token, identity ones included", unit="experts", low=1, per_layer=True
    )
    identities: int = model_setting(4, "identity experts", low=1)
    experts_per_token: float = model_setting(
        0.0,
        "budget: mean experts per token that are not identity; 0 = two thirds of k, as LongCat's",
        unit="experts",
        low=0.0,
        per_layer=True,
    )
    rate: float = free_setting(0.5, "gain of the bias after an update (mu); 0 freezes it", low=0.0)
    device_groups: int = free_setting(
        1, "groups of experts that the free_balance loss asks to be balanced", low=1
    )
    losses: ClassVar = {"free_balance": 1e-4, "router_z": 0.0}
    gives = Router.gives | {"choices_TJ", "shares_TJ"}

    @property
    def free_experts(self) -> int:
        """Identity experts."""
        return self.identities

    @property
    def budget(self) -> float:
        """Mean experts per token that are not identity (a)."""
        return self.experts_per_token or 2 * self.k / 3

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where a token cannot have so many experts, or groups are not even."""
        if obstacle := super().obstacle(num_experts):
            return obstacle
        fewest = max(0, self.k - self.identities)
        if not fewest <= self.budget < self.k:
            return (
                f"experts_per_token={self.budget:g} must be at least {fewest} and less "
                f"than k={self.k}, which is at most config.model.moe.num_experts={num_experts}"
            )
        if num_experts % self.device_groups:
            return (
                f"device_groups={self.device_groups} must divide "
                f"config.model.moe.num_experts={num_experts}"
            )
        return None

    def describe(self) -> str:
        """Names the rule."""
        return (
            f"top-{self.k} with {self.identities} identity experts and a budget of {self.budget:g}"
        )

    def advice(self, wish: str) -> str:
        """Names the gain, and the budget."""
        if wish == "balance":
            return "raise config.model.moe.zero_computation.rate"
        change = "lower" if wish == "fewer" else "raise"
        budget = f"experts_per_token={self.budget:g}"
        return f"{change} config.model.moe.zero_computation.{budget}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and the budget."""
        budget = self.budget
        return Bounds(
            self.k, max(0, self.k - self.identities), budget, min(float(self.k), budget + 0.25)
        )

    def initial_state(self, num_experts: int):
        """A bias of zero; identity experts have none."""
        return {"bias_E": jnp.zeros(num_experts, jnp.float32)}

    def shown(self, state):
        """The smallest and the largest bias."""
        return {"bias_min": jnp.min(state["bias_E"]), "bias_max": jnp.max(state["bias_E"])}

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` and ``logits_TE`` end in those of the identity experts."""
        probs_TS, logits_TS = softmax_scores(given.logits_TE, given.valid_T)
        experts = probs_TS.shape[-1] - self.identities
        bias_S = jnp.pad(given.state["bias_E"], (0, self.identities))
        _, chosen_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TS) + bias_S, self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], chosen_TK.shape)
        routing = fill_slots(
            probs_TS, logits_TS, chosen_TK, keep_TK, renormalize=False,
            free_experts=self.identities,
        )  # fmt: skip
        free_TK = keep_TK & (chosen_TK >= experts)
        prob_TK = jnp.take_along_axis(probs_TS, chosen_TK, axis=-1)
        free_T = jnp.sum(jnp.where(free_TK, prob_TK, 0.0), axis=-1)
        routing = dataclasses.replace(routing, free_T=free_T)
        return self._grouped(routing, jnp.sum(free_TK, axis=-1, dtype=jnp.int32))

    def _grouped(self, routing: Routing, identity_T) -> Routing:
        """The routing with choices and probabilities of device groups, and of identity experts.

        w_j = D / a of D device groups, and 1 / (k - a) of the identity experts.
        """
        groups, budget = self.device_groups, self.budget

        def by_group(value_TE):
            return jnp.sum(value_TE.reshape(len(value_TE), groups, -1), axis=-1)

        probs_TE = routing.probs_TE[:, : routing.num_experts]
        identity_TZ = routing.probs_TE[:, routing.num_experts :]
        choices_TG = by_group(routing.chosen_TE.astype(jnp.int32))
        shares_T1 = jnp.sum(identity_TZ, axis=-1, keepdims=True) / (self.k - budget)
        shares_TJ = jnp.append(groups / budget * by_group(probs_TE), shares_T1, axis=-1)
        return with_groups(routing, jnp.append(choices_TG, identity_T[:, None], -1), shares_TJ)

    def measure(self, params, given, routing):
        """Tokens of each expert, and all."""
        return {"load_E": routing.load_E, "tokens": jnp.sum(given.valid_T, dtype=jnp.int32)}

    def next_state(self, params_N, state_N, seen_N):
        """b + mu (a / (k E) - load / (k T))."""
        load_NE = seen_N["load_E"].astype(jnp.float32)
        choices_N1 = self.k * jnp.maximum(seen_N["tokens"], 1)[:, None]
        wanted = self.budget / (self.k * load_NE.shape[-1])
        moved_NE = state_N["bias_E"] + self.rate * (wanted - load_NE / choices_N1)
        # A batch of padding alone says nothing.
        some_N1 = seen_N["tokens"][:, None] > 0
        return {"bias_E": jnp.where(some_N1, moved_NE, state_N["bias_E"])}, None
