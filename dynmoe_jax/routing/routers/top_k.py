"""Top-k routing: Switch (k = 1, arXiv 2101.03961), GShard (k = 2, arXiv 2006.16668), Mixtral.

Of a dense feed-forward that is split into experts, all of them together compute what it did if each
weighs 1: so MoEfication (arXiv 2110.01786), with a router of two layers, and straight through
FactorLLM (arXiv 2408.11855).

Axis legend: T tokens, E experts, K = k slots per token, D model width, S scores (as many as E).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import (
    Routing,
    fill_slots,
    softmax_scores,
    straight_through,
    used_first,
)
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput

_TINY = 1e-9
"""Added to the sum that renormalized weights are divided by, as GShard's code does."""


_WEIGHED = {"straight_through": (False,)}
"""Where weights are probabilities, and not 1."""


@ROUTERS.register("top_k")
@dataclasses.dataclass(frozen=True)
class TopK(Router):
    """Every token takes its k most probable experts, weighed by their probabilities.

    GShard keeps a second expert by its weight g2 after renormalization: always, never, where g2 >
    threshold, or with probability min(1, g2 / threshold).  An expert that is not kept leaves the
    weight of the other as it was.  Where nothing is drawn (evaluation, generation), ``"random"``
    keeps all.
    """

    k: int = model_setting(
        2, "experts per token", unit="experts", low=1, formerly=("model.moe.top_k",), per_layer=True
    )
    straight_through: bool = model_setting(
        False,
        "the combine weights are 1, with the gradient of the probabilities (FactorLLM)",
    )
    net: str = model_setting(
        "linear",
        "what makes the logits of a token: a matrix, or two with a tanh between them, of which the "
        "second is [experts, experts] and begins as the identity (MoEfication)",
        choices=("linear", "tanh"),
    )
    renormalize: bool = model_setting(
        False,
        "divide the combine weights by their sum (GShard, Mixtral)",
        formerly=("model.moe.renormalize",),
        only_with=_WEIGHED,
    )
    softmax: str = model_setting(
        "before",
        "softmax over all experts before the choice, or over the chosen ones after it (Mixtral); "
        "after is the same as before with renormalize",
        choices=("before", "after"),
        only_with=_WEIGHED,
    )
    second: str = model_setting(
        "all",
        "which experts beyond a token's first are kept (GShard: random), by their weights",
        choices=("all", "none", "threshold", "random"),
        only_with=_WEIGHED,
    )
    second_threshold: float = model_setting(
        0.2,
        "weight that a second expert is compared with",
        above=0.0,
        high=1.0,
        only_with={"second": ("threshold", "random")},
    )

    @property
    def reads(self) -> frozenset[str]:
        """Noise, for the coins of second experts."""
        return frozenset({"noise"}) if self.second == "random" else frozenset()

    def describe(self) -> str:
        """Names the rule."""
        kept = {"all": "", "none": ", first kept"}
        weights = ", straight through" if self.straight_through else ""
        return f"top-{self.k}{kept.get(self.second, f', second by {self.second}')}{weights}"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less where all are kept."""
        if self.second == "none":
            return Bounds(1, 1, 1.0, 1.0)
        fewest = self.k if self.second == "all" else 1
        return Bounds(self.k, fewest, float(self.k), float(self.k))

    def parameters(self, width: int, num_experts: int) -> dict[str, Parameter]:
        """The matrix, and the one behind a tanh."""
        declared = super().parameters(width, num_experts)
        if self.net == "tanh":
            identity = lambda key, shape: jnp.eye(shape[0])  # noqa: E731
            declared["mix_SS"] = Parameter((num_experts, num_experts), identity)
        return declared

    @property
    def logits(self):
        """None of one matrix, which is the layer's own way."""
        return None if self.net == "linear" else self._behind_tanh

    def _behind_tanh(self, params, x_TD, num_experts):
        """tanh(x W) M, at full precision."""
        exact = jax.lax.Precision.HIGHEST
        inner_TS = jnp.matmul(x_TD.astype(jnp.float32), params["router_DE"], precision=exact)
        return jnp.matmul(jnp.tanh(inner_TS), params["mix_SS"], precision=exact)

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        renormalize = self.renormalize and self.softmax == "before"
        routing = fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=renormalize)
        if self.softmax == "after":
            weight_TK = jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TK, axis=-1), axis=-1)
            routing = dataclasses.replace(routing, weight_TK=jnp.where(keep_TK, weight_TK, 0.0))
        if self.straight_through:
            return straight_through(routing)
        return routing if self.second == "all" else self._without_seconds(routing, given)

    def _without_seconds(self, routing: Routing, given: RouterInput) -> Routing:
        """Leaves out the experts behind a token's first that are not kept."""
        if self.second == "none":
            return dataclasses.replace(
                routing,
                expert_TK=routing.expert_TK[:, :1],
                weight_TK=routing.weight_TK[:, :1],
            )
        kept_TK = self._kept(jax.lax.stop_gradient(routing.weight_TK), given)
        kept_TK = routing.used_TK & kept_TK.at[:, 0].set(True)
        return used_first(
            dataclasses.replace(
                routing,
                expert_TK=jnp.where(kept_TK, routing.expert_TK, routing.num_experts),
                weight_TK=jnp.where(kept_TK, routing.weight_TK, 0.0),
            )
        )

    def _kept(self, weight_TK: Float[Array, "T K"], given: RouterInput) -> Bool[Array, "T K"]:
        """Whether the weight of a slot is enough."""
        g_TK = weight_TK / (jnp.sum(weight_TK, axis=-1, keepdims=True) + _TINY)
        if self.second == "threshold":
            return g_TK > self.second_threshold
        if given.key_T is None:
            return jnp.ones(g_TK.shape, bool)
        u_TK = given.draws(lambda key: jax.random.uniform(key, (self.k,)))
        return u_TK < g_TK / self.second_threshold
