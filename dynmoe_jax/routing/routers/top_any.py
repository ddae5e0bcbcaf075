"""Top-any gating: every expert has a threshold of its own, and experts come and go in training.

DynMoE (arXiv 2405.14297).  Every expert for whose learned vector a token has a cosine above the
expert's learned threshold is used; their outputs are averaged.

Axis legend: T tokens, D model width, E experts (places for them), N MoE layers.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput

_LARGEST_SCALE = 100.0
"""Bound on a learned scale."""

_MOST_COUNTED = 2**30
"""Tokens behind which a record counts no further; a batch may have as many."""


@ROUTERS.register("top_any")
@dataclasses.dataclass(frozen=True)
class TopAny(Router):
    """A token takes every expert with sigmoid(c cos(x, w_e)) > sigmoid(c G_e), each weighed by 1/n.

    The choice is learned by a straight-through gradient: weights are exactly 1/n, and their slope
    is that of (s_e - threshold_e) / n for the experts that are used, without that of the count n.
    A token that no expert takes has none in training, and at inference that of its largest score.

    ``config.model.moe.num_experts`` are places.  Again and again, ``wait`` updates pass, in
    ``window`` more it is recorded what experts get, and ``rest`` follow.  At the end of the window
    experts without a token in it are removed, and if any token had no expert, one place gets a new
    one, whose vector is the direction of the sum of those tokens; its feed-forward is that which
    lies in the place.
    """

    scale: float = model_setting(
        1.0, "factor of cosines and thresholds before the sigmoid (c)", above=0.0, high=100.0
    )
    learned_scale: bool = model_setting(False, "learn the scale, up to 100, from there on")
    initial_experts: int = model_setting(
        0, "experts that are there at the start; 0 = one in each place", unit="experts", low=0
    )
    wait: int = free_setting(300, "updates before what is recorded", low=0, high=1e8)
    window: int = free_setting(
        300,
        "updates that are recorded, after which experts are removed or added; 0 = they never are",
        low=0,
        high=1e8,
    )
    rest: int = free_setting(300, "updates behind it, before all begins anew", low=0, high=1e8)
    losses: ClassVar = {"diversity": 1e-2, "balance": 0.0}
    gives = frozenset({"distribution", "counts", "expert_vectors"})

    def describe(self) -> str:
        """Names the rule."""
        return "top-any, by learned thresholds"

    def advice(self, wish: str) -> str:
        """Names the weight of the loss that shapes the experts' vectors."""
        if wish == "balance":
            return super().advice(wish)
        return f"{'raise' if wish == 'fewer' else 'lower'} config.loss.diversity.weight"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts at most, none at the least; half at the start, whose cosine is > 0."""
        expected = max((self.initial_experts or num_experts) / 2, 1.0)
        return Bounds(num_experts, 0, expected, expected)

    def parameters(self, width: int, num_experts: int):
        """Orthogonal vectors, thresholds that any positive cosine passes, and the scale."""
        found = {
            "router_DE": Parameter((width, num_experts), jax.nn.initializers.orthogonal()),
            "threshold_E": Parameter((num_experts,), "zeros", decay=False),
        }
        if self.learned_scale:
            start = math.log(self.scale)
            of_scale = Parameter((1,), lambda _, shape: jnp.full(shape, start), decay=False)
            found["log_scale_1"] = of_scale
        return found

    def initial_state(self, num_experts: int):
        """The experts that are there, and what they have got of tokens."""
        count = self.initial_experts or num_experts
        return {
            "live_E": (jnp.arange(num_experts) < count).astype(jnp.float32),
            "routed_E": jnp.zeros(num_experts, jnp.int32),
            "unrouted": jnp.int32(0),
            "updates": jnp.int32(0),
        }

    def layer_state(self, width: int, num_experts: int):
        """The same, and the sum of the tokens that no expert took."""
        sums = {"unrouted_D": jnp.zeros(width, jnp.float32)}
        return self.initial_state(num_experts) | sums

    def shown(self, state):
        """Experts that are there."""
        return {"live_experts": jnp.sum(state["live_E"], axis=-1)}

    def logits(self, params, x_TD, num_experts):
        """c cos(x, w_e)."""
        x_TD, w_DE = x_TD.astype(jnp.float32), params["router_DE"].astype(jnp.float32)
        return self._scale(params) * (_unit(x_TD, -1) @ _unit(w_DE, 0))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the order of choice is that of the scores above their thresholds.

        ``probs_TE`` are the scores of the experts that are there over their sum.
        """
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        experts = logits_TE.shape[1]
        live_E, valid_T1 = given.state["live_E"] > 0, given.valid_T[:, None]
        score_TE = jax.nn.sigmoid(logits_TE)
        threshold_E = params.get("threshold_E", jnp.zeros(experts))
        above_TE = score_TE - jax.nn.sigmoid(self._scale(params) * threshold_E)
        used_TE = (above_TE > 0) & live_E & valid_T1
        if not given.training:
            best_T = jnp.argmax(jnp.where(live_E, score_TE, -1.0), axis=-1)
            nobody_T1 = ~jnp.any(used_TE, axis=-1, keepdims=True)
            used_TE |= nobody_T1 & (best_T[:, None] == jnp.arange(experts)) & valid_T1
        gate_TE = jnp.where(used_TE, above_TE, 0.0)
        # A gradient of one through the sign of the gate, which is then exactly one.
        gate_TE = used_TE + (gate_TE - jax.lax.stop_gradient(gate_TE))
        weight_TE = gate_TE / jnp.maximum(jnp.sum(used_TE, axis=-1, keepdims=True), 1)
        order_TE = jax.lax.stop_gradient(jnp.where(used_TE, above_TE, -jnp.inf))
        _, expert_TE = jax.lax.top_k(order_TE, experts)
        keep_TE = jnp.take_along_axis(used_TE, expert_TE, axis=-1)
        routing = fill_slots(weight_TE, logits_TE, expert_TE, keep_TE, renormalize=False)
        score_TE = jnp.where(live_E, score_TE, 0.0)
        probs_TE = score_TE / jnp.sum(score_TE, axis=-1, keepdims=True)
        return dataclasses.replace(routing, probs_TE=probs_TE)

    def measure(self, params, given: RouterInput, routing: Routing):
        """Tokens of each expert, those without any, and the sum of these."""
        alone_T = given.valid_T & (routing.experts_per_token_T == 0)
        x_TD = jax.lax.stop_gradient(given.x_TD).astype(jnp.float32)
        return {
            "routed_E": routing.load_E,
            "unrouted": jnp.sum(alone_T, dtype=jnp.int32),
            "unrouted_D": jnp.sum(jnp.where(alone_T[:, None], x_TD, 0.0), axis=0),
        }

    def next_state(self, params_N, state_N, seen_N):
        """Records, and at the end of that removes experts and adds one, in each layer."""
        if not self.window:
            return state_N, None
        step = jax.vmap(self._next_of_layer)
        router = {name: params_N[name] for name in ("router_DE", "threshold_E")}
        return step(router, state_N, seen_N)

    def _next_of_layer(self, params, state, seen):
        end = self.wait + self.window
        phase = state["updates"] % (end + self.rest)
        recorded = (phase >= self.wait) & (phase < end)
        total = {name: state[name] + jnp.where(recorded, seen[name], 0) for name in seen}
        # Whether there were any is all that is asked; a long window is more than 32 bits count.
        total |= {
            name: jnp.minimum(total[name], _MOST_COUNTED) for name in ("routed_E", "unrouted")
        }
        ends = phase + 1 == end
        live_E = state["live_E"] > 0
        used_E = live_E & (total["routed_E"] > 0)
        # Where nobody got anything, all stay.
        left_E = jnp.where(ends & jnp.any(used_E), used_E, live_E)
        born = ends & (total["unrouted"] > 0) & ~jnp.all(left_E)
        new_E = born & (jnp.arange(len(left_E)) == jnp.argmin(left_E))
        vector_D1 = _unit(total["unrouted_D"], 0)[:, None]
        params = {
            "router_DE": jnp.where(new_E, vector_D1, params["router_DE"]),
            "threshold_E": jnp.where(new_E, 0.0, params["threshold_E"]),
        }
        total = {name: jnp.where(ends, 0, value) for name, value in total.items()}
        live_E = (left_E | new_E).astype(jnp.float32)
        return total | {"live_E": live_E, "updates": state["updates"] + 1}, params

    def _scale(self, params):
        if not self.learned_scale or "log_scale_1" not in params:
            return self.scale
        return jnp.exp(jnp.minimum(params["log_scale_1"], math.log(_LARGEST_SCALE)))


def _unit(x, axis: int):
    """Vectors along an axis, of length 1; zeros stay zeros."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
