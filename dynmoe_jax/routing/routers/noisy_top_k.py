"""Noisy top-k gating, and the two losses that balance it: importance and load.

The sparsely-gated mixture of experts (Shazeer et al., arXiv 1701.06538, section 2.1 and appendix
A).

Axis legend: T tokens, D model width, E experts, K = k slots per token.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import LOSSES, ROUTERS
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput

NOISE_FLOOR = 1e-2
"""Least standard deviation of the noise, so that the load stays smooth."""


@ROUTERS.register("noisy_top_k")
@dataclasses.dataclass(frozen=True)
class NoisyTopK(Router):
    """A token takes the k largest of H = x W + N(0, 1) softplus(x W_noise), by their softmax.

    Noise is drawn in training alone.  Both matrices start at zero, so that in the beginning the
    noise spreads tokens evenly (equations 3 to 5).
    """

    k: int = model_setting(2, "experts per token", unit="experts", low=1, per_layer=True)
    reads = frozenset({"noise"})
    losses: ClassVar = {"importance": 0.1, "load": 0.1}
    gives = frozenset({"distribution", "softmax", "logits", "counts", "load_TE"})

    def describe(self) -> str:
        """Names the rule."""
        return f"noisy top-{self.k}"

    def advice(self, wish: str) -> str:
        """Names the two losses; the number of experts is fixed."""
        return "raise config.loss.importance.weight and config.loss.load.weight"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k, and never less."""
        return Bounds(self.k, self.k, float(self.k), float(self.k))

    def parameters(self, width: int, num_experts: int):
        """W and W_noise, zeros."""
        names = ("router_DE", "noise_DE")
        return {name: Parameter((width, num_experts), init="zeros") for name in names}

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; ``probs_TE`` and ``logits_TE`` are those of H."""
        clean_TE = given.logits_TE
        if not given.training:
            return self._chosen(clean_TE, given)
        # Padding may hold NaN, and 0 * NaN is NaN.
        x_TD = jnp.where(given.valid_T[:, None], given.x_TD, 0).astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        sigma_TE = jnp.matmul(x_TD, params["noise_DE"], precision=exact)
        sigma_TE = jax.nn.softplus(sigma_TE) + NOISE_FLOOR
        noisy_TE = clean_TE
        if given.key_T is not None:
            experts = clean_TE.shape[-1]
            drawn_TE = given.draws(lambda key: jax.random.normal(key, (experts,)))
            noisy_TE = clean_TE + drawn_TE * sigma_TE
        routing = self._chosen(noisy_TE, given)
        clean_TE = jnp.where(given.valid_T[:, None], clean_TE, 0.0)
        load_TE = chance_of_choice(clean_TE, routing.logits_TE, sigma_TE, self.k)
        return dataclasses.replace(routing, extra={"load_TE": load_TE})

    def _chosen(self, logits_TE: Float[Array, "T E"], given: RouterInput) -> Routing:
        """The k largest, by the softmax over them."""
        probs_TE, logits_TE = softmax_scores(logits_TE, given.valid_T)
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(logits_TE), self.k)
        keep_TK = jnp.broadcast_to(given.valid_T[:, None], expert_TK.shape)
        routing = fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=False)
        # Of the logits, as the paper has it: exact also where all chosen probabilities underflow.
        weight_TK = jax.nn.softmax(jnp.take_along_axis(logits_TE, expert_TK, axis=-1), axis=-1)
        return dataclasses.replace(routing, weight_TK=jnp.where(keep_TK, weight_TK, 0.0))


def chance_of_choice(
    clean_TE: Float[Array, "T E"],
    noisy_TE: Float[Array, "T E"],
    sigma_TE: Float[Array, "T E"],
    k: int,
) -> Float[Array, "T E"]:
    """P(x, e): chance that an expert is chosen if its own noise alone is drawn anew (equation 9).

    An expert is chosen if its logit passes the k-th largest of the others: the (k+1)-th largest of
    all if it is among the k now, the k-th if it is not.

    Args:
      clean_TE: logits without noise.
      noisy_TE: logits with the noise that was drawn.
      sigma_TE: standard deviation of the noise.
      k: experts per token.
    """
    if k == clean_TE.shape[-1]:
        return jnp.ones_like(clean_TE)
    top_TK, expert_TK = jax.lax.top_k(noisy_TE, k + 1)
    chosen_TKE = expert_TK[:, :k, None] == jnp.arange(clean_TE.shape[-1])
    chosen_TE = jnp.any(chosen_TKE, axis=1)
    threshold_TE = jnp.where(chosen_TE, top_TK[:, k:], top_TK[:, k - 1 : k])
    return jax.scipy.stats.norm.cdf((clean_TE - threshold_TE) / sigma_TE)


def squared_variation(value_E: Float[Array, "*N E"]) -> Float[Array, "*N"]:
    """Squared coefficient of variation: variance over squared mean, over the experts."""
    mean_N = jnp.mean(value_E, axis=-1)
    return jnp.var(value_E, axis=-1) / (jnp.square(mean_N) + 1e-10)


@LOSSES.register("importance")
@dataclasses.dataclass(frozen=True)
class Importance(RoutingLoss):
    """Squared variation of the experts' sums of combine weights (equations 6 and 7).

    0 for even sums, E / m - 1 where m of the E experts share all evenly.
    """

    weight: float = weight_setting(
        help="of the importance loss (w_importance; the paper: 0.1 for language models, 0.01 for "
        "translation)"
    )
    controller: str = controller_setting()
    needs = frozenset({"counts"})
    additive = False

    def sums(self, routing, given, params):
        """Combine weights of each expert."""
        own_TKE = routing.expert_TK[..., None] == jnp.arange(routing.num_experts)
        weight_TE = jnp.sum(jnp.where(own_TKE, routing.weight_TK[..., None], 0.0), axis=-2)
        return {"weights_E": over_tokens(weight_TE, given.valid_T)}

    def value(self, sums, tokens):
        """CV^2."""
        return squared_variation(sums["weights_E"] / tokens)


@LOSSES.register("load")
@dataclasses.dataclass(frozen=True)
class Load(RoutingLoss):
    """Squared variation of a smooth estimate of how many tokens choose each expert (appendix A)."""

    weight: float = weight_setting(
        help="of the load loss (w_load; the paper: 0.1 for language models, 0.01 for translation)"
    )
    controller: str = controller_setting()
    needs = frozenset({"load_TE"})
    additive = False

    def sums(self, routing, given, params):
        """Chances of being chosen, by expert."""
        return {"load_E": over_tokens(routing.extra["load_TE"], given.valid_T)}

    def value(self, sums, tokens):
        """CV^2."""
        return squared_variation(sums["load_E"] / tokens)
