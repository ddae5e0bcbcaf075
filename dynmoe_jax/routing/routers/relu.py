"""ReMoE: a ReLU gate, an L1 loss that balances, and a coefficient that holds the sparsity.

Fully differentiable MoE with ReLU routing (arXiv 2412.14711): no softmax and no top-k, so the layer
is continuous everywhere; how many experts a token uses is steered by the loss alone.

Axis legend: T tokens, E experts, N MoE layers.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import CONTROLLERS, LOSSES, ROUTERS
from dynmoe_jax.routing.controllers.controller import Controller, state_of
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)
from dynmoe_jax.routing.record import Routing, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Router, RouterInput

_RANGE = (1e-20, 1e6)
"""Smallest and largest coefficient of the L1 loss."""


@ROUTERS.register("relu")
@dataclasses.dataclass(frozen=True)
class ReLU(Router):
    """Every expert with a positive logit is used, weighed by it (equations 4 and 5)."""

    experts_per_token: float = model_setting(
        2.0, "mean experts per token that the l1 loss aims at (k)", unit="experts", above=0.0
    )
    losses: ClassVar = {"l1": 1e-8}
    gives = frozenset({"gates", "logits", "counts"})

    def describe(self) -> str:
        """Names the rule."""
        return f"ReLU, {self.experts_per_token:g} on average"

    def advice(self, wish: str) -> str:
        """Names what moves the coefficient of the loss."""
        if wish == "balance":
            return "lower config.loss.l1.sparsity.factor"
        return f"{'raise' if wish == 'fewer' else 'lower'} config.loss.l1.sparsity.factor"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts at most, none at the least."""
        expected = self.experts_per_token
        return Bounds(num_experts, 0, expected, min(2 * expected, num_experts))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the order of choice is that of the gates, from the largest down."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        gate_TE = jax.nn.relu(logits_TE)
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(gate_TE), gate_TE.shape[-1])
        keep_TK = jnp.take_along_axis(gate_TE, expert_TK, axis=-1) > 0
        return fill_slots(gate_TE, logits_TE, expert_TK, keep_TK, renormalize=False)


@LOSSES.register("l1")
@dataclasses.dataclass(frozen=True)
class L1(RoutingLoss):
    """E / (k T^2) sum_e n_e sum_t g_te, the refined L1 loss (equations 10 and 11).

    n_e is the number of tokens that use expert e, without gradient; with even load it is the mean
    of the gates' sums.
    """

    weight: float = weight_setting(help="of the L1 loss of ReLU gates, at the first step (lambda)")
    controller: str = controller_setting(default="sparsity")
    needs = frozenset({"gates", "counts"})
    additive = False

    def sums(self, routing, given, params):
        """Tokens that use each expert, and gates, over k."""
        used_E = over_tokens((routing.probs_TE > 0).astype(jnp.float32), given.valid_T)
        gates_E = over_tokens(routing.probs_TE, given.valid_T)
        return {
            "used_E": jax.lax.stop_gradient(used_E),
            "gates_E": gates_E / given.expected,
        }

    def value(self, sums, tokens):
        """The loss of each layer."""
        used_E, gates_E = sums["used_E"] / tokens, sums["gates_E"] / tokens
        return used_E.shape[-1] * jnp.sum(used_E * gates_E, axis=-1)


@CONTROLLERS.register("sparsity")
@dataclasses.dataclass(frozen=True)
class Sparsity(Controller):
    """Multiplies the coefficient while gates are too dense, and divides it otherwise.

    lambda <- lambda a^sign(s* - s), where s is the share of gates that are 0, over all layers, and
    s* = 1 - k/E; where they are equal it divides (equation 8 and the authors' code).
    """

    factor: float = free_setting(
        1.2, "what a step multiplies or divides the coefficient by (alpha)", above=1.0
    )

    def initial(self, weight, layers):
        """The coefficient that the settings name."""
        return state_of(coefficient=weight)

    def coefficient(self, weight, state, step):
        """One for all layers."""
        return state["coefficient"]

    def update(self, state, counts):
        """The next coefficient."""
        experts = jnp.maximum(jnp.sum(counts.exists_NE), 1)
        # Of many layers together more than 32 bits count.
        used = jnp.sum(counts.load_NE.astype(jnp.float32)) / (
            jnp.maximum(counts.tokens, 1) * experts
        )
        wanted = jnp.sum(counts.expected_N) / experts
        factor = jnp.where(used > wanted, self.factor, 1 / self.factor)
        # Bounded, so that it finds back from a target that could not be met for long.
        return state_of(coefficient=jnp.clip(state["coefficient"] * factor, *_RANGE))
