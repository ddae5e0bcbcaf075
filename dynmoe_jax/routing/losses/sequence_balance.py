"""Sequence-wise load-balancing loss (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

Axis legend: T tokens, L tokens of a sequence, Q sequences, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import RoutingLoss, controller_setting, weight_setting


@LOSSES.register("sequence_balance")
@dataclasses.dataclass(frozen=True)
class SequenceBalance(RoutingLoss):
    """Mean over sequences of sum_e f_e P_e, 1 where the load of each sequence is even.

    ``f_e`` is E over the choices of a sequence, times those that expert e would get by scores
    alone, without a bias and without groups; ``P_e`` is its mean share of the scores.  A sequence
    with padding weighs as many tokens as it has.
    """

    weight: float = weight_setting(help="of the sequence-wise load-balance loss (DeepSeek-V3)")
    controller: str = controller_setting()
    label = "load balance of a sequence"
    needs = frozenset({"distribution", "counts"})

    def sums(self, routing, given, params):
        """The losses of the sequences, each times its tokens."""
        probs_TE = routing.probs_TE[..., : routing.num_experts]
        _, best_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), routing.slots)
        # As many as the token uses: all k, or what a router that counts has counted.
        used_TK = jnp.arange(routing.slots) < routing.experts_per_token_T[:, None]
        best_TK = jnp.where(used_TK & given.valid_T[:, None], best_TK, routing.num_experts)
        chosen_TE = dataclasses.replace(routing, expert_TK=best_TK).chosen_TE

        def of_sequences(value_TX):
            return jnp.sum(value_TX.reshape(-1, given.length, value_TX.shape[-1]), axis=1)

        chosen_QE = of_sequences(chosen_TE.astype(jnp.float32))
        # where, not a product: a padding token may hold NaN.
        probs_QE = of_sequences(jnp.where(given.valid_T[:, None], probs_TE, 0.0))
        choices_Q1 = jnp.maximum(jnp.sum(chosen_QE, axis=-1, keepdims=True), 1)
        # Times the tokens of the sequence, of which its mean probability is a mean.
        loss_QE = routing.num_experts * chosen_QE / choices_Q1 * probs_QE
        return {"loss": jnp.sum(loss_QE)}

    def value(self, sums, tokens):
        """The mean, sequences weighed by their tokens."""
        return sums["loss"] / tokens
