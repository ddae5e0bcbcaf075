"""Load-balancing loss: E sum_e f_e Q_e (Switch eq. 4; Top-P paper eq. 5).

``f_e`` is the share of tokens that chose expert e (no gradient), ``Q_e`` the mean router
probability of expert e.  Over the whole batch it is that of arXiv 2501.11873, over each sequence
that of DeepSeek-V3 (arXiv 2412.19437, eq. 17 to 20), over groups of experts the device-level loss
of DeepSeekMoE (arXiv 2401.06066, eq. 15 to 17).

Axis legend: T tokens, E experts, S sequences, G groups of experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    """The load-balancing loss of the whole batch, of each microbatch or of each sequence.

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
        choices=("batch", "microbatch", "sequence"),
        formerly=("loss.balance_over",),
    )
    groups: int = free_setting(
        0,
        "groups of neighboring experts among which load is balanced, such as those of a device; 0 "
        "= every expert is one",
        low=0,
    )
    controller: str = controller_setting()
    label = "load balance"
    needs = frozenset({"distribution", "counts"})

    def obstacle(self, num_experts, width):
        """Says so where experts cannot be divided."""
        if self.groups and num_experts % self.groups:
            return (
                f"groups={self.groups} must divide config.model.moe.num_experts={num_experts}, or "
                "be 0"
            )
        if self.groups == 1 and num_experts > 1:
            return "groups=1 leaves nothing to balance; set it to 0, or to the number of devices"
        return None

    @property
    def additive(self) -> bool:
        """Whether each part is balanced by itself; the product of two means is not linear."""
        return self.over != "batch"

    @property
    def by_microbatch(self) -> bool:
        """Whether each microbatch is balanced by itself."""
        return self.over == "microbatch"

    def sums(self, routing, given, params):
        """Tokens that chose each expert, those whose first choice it was, and probabilities.

        Over sequences they are the losses of those, times their tokens.
        """
        probs_TE = routing.probs_TE[..., : routing.num_experts]
        chosen = {"chosen_E": routing.chosen_TE, "probs_E": probs_TE}
        first = dataclasses.replace(routing, expert_TK=routing.expert_TK[..., :1])
        chosen["first_E"] = first.chosen_TE

        def summed(valid_T, arrays):
            sums = {n: over_tokens(x.astype(jnp.float32), valid_T) for n, x in arrays.items()}
            return {n: x if n == "probs_E" else jax.lax.stop_gradient(x) for n, x in sums.items()}

        if self.over != "sequence":
            return summed(given.valid_T, chosen)
        length = given.length or given.valid_T.shape[0]
        cut = lambda x: x.reshape(-1, length, *x.shape[1:])  # noqa: E731
        valid_SL = cut(given.valid_T)
        sums_S = jax.vmap(summed)(valid_SL, jax.tree.map(cut, chosen))
        tokens_S = jnp.sum(valid_SL, axis=-1, dtype=jnp.float32)
        loss_S = self._of_sums(sums_S, jnp.maximum(tokens_S, 1)[:, None])
        return {"by_sequence": jnp.sum(tokens_S * loss_S)}

    def value(self, sums, tokens):
        """E sum_e f_e Q_e, or the mean of those of the sequences."""
        if self.over == "sequence":
            return sums["by_sequence"] / tokens
        return self._of_sums(sums, tokens)

    def _of_sums(self, sums, tokens) -> Float[Array, "*"]:
        share_E = sums["first_E" if self.counts == "first_choice_only" else "chosen_E"] / tokens
        if self.counts == "per_choice":
            share_E = share_E / jnp.maximum(jnp.sum(share_E, axis=-1, keepdims=True), 1e-9)
        probs_E = sums["probs_E"] / tokens
        experts = share_E.shape[-1]
        if self.groups:
            grouped = (*share_E.shape[:-1], self.groups, experts // self.groups)
            share_E = jnp.mean(share_E.reshape(grouped), axis=-1)
            probs_E = jnp.sum(probs_E.reshape(grouped), axis=-1)
        return experts * jnp.sum(share_E * probs_E, axis=-1)
