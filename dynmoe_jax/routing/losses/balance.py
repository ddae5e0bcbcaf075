"""Load-balancing loss: E sum_e f_e Q_e (Switch eq. 4; Top-P paper eq. 5).

``f_e`` is the share of tokens that chose expert e (no gradient), ``Q_e`` the mean router
probability of expert e.

Axis legend: T tokens, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import (
    RoutingLoss,
    controller_setting,
    over_tokens,
    weight_setting,
)


@LOSSES.register("balance")
@dataclasses.dataclass(frozen=True)
class Balance(RoutingLoss):
    """The load-balancing loss of the whole batch.

    With ``counts="sum"``, f counts every chosen expert, so the loss equals the mean number of
    experts per token when load and probabilities are even: it presses on the count as well.
    """

    weight: float = weight_setting(
        help="of the load-balance loss (alpha)", formerly=("loss.balance_weight",)
    )
    counts: str = free_setting(
        "sum",
        "choices that the load-balance loss counts: all, all over their number, or first ones",
        choices=("sum", "per_choice", "first_choice_only"),
        formerly=("loss.balance_counts",),
    )
    over: str = free_setting(
        "batch",
        "what the load-balance loss asks to be balanced; with config.train.microbatches > 1 the "
        "whole batch takes one more forward pass",
        choices=("batch", "microbatch"),
        formerly=("loss.balance_over",),
    )
    controller: str = controller_setting()
    label = "load balance"
    needs = frozenset({"distribution", "counts"})

    @property
    def additive(self) -> bool:
        """Whether each microbatch is balanced by itself; the product of two means is not linear."""
        return self.by_microbatch

    @property
    def by_microbatch(self) -> bool:
        """Whether each microbatch is balanced by itself."""
        return self.over == "microbatch"

    def sums(self, routing, given, params):
        """Tokens that chose each expert, those whose first choice it was, and probabilities."""

        def chosen_E(chosen_TE):
            counted = over_tokens(chosen_TE.astype(jnp.float32), given.valid_T)
            return jax.lax.stop_gradient(counted)

        first = dataclasses.replace(routing, expert_TK=routing.expert_TK[..., :1])
        return {
            "chosen_E": chosen_E(routing.chosen_TE),
            "first_E": chosen_E(first.chosen_TE),
            "probs_E": over_tokens(routing.probs_TE[..., : routing.num_experts], given.valid_T),
        }

    def value(self, sums, tokens):
        """E sum_e f_e Q_e."""
        share_E = sums["first_E" if self.counts == "first_choice_only" else "chosen_E"] / tokens
        if self.counts == "per_choice":
            share_E = share_E / jnp.maximum(jnp.sum(share_E, axis=-1, keepdims=True), 1e-9)
        return share_E.shape[-1] * jnp.sum(share_E * sums["probs_E"] / tokens, axis=-1)
