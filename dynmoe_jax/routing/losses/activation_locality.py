"""Activation locality: neighbors use the same experts (BlockFFN, arXiv 2507.08771, section 3.2).

Axis legend: B sequences, L tokens of one, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.loss import RoutingLoss, controller_setting, weight_setting


@LOSSES.register("activation_locality")
@dataclasses.dataclass(frozen=True)
class ActivationLocality(RoutingLoss):
    """Binary cross entropy of a token's soft activations, those of the next token given.

    Of logits z the activations are sigmoid(c z), and the target carries gradient as well.  Pairs
    lie in one document; the loss is the sum over pairs of the mean over experts, over all tokens.
    """

    weight: float = weight_setting(help="of the activation locality loss of neighboring tokens")
    steepness: float = free_setting(
        100.0, "logits are multiplied by this before the sigmoid (c)", above=0.0
    )
    controller: str = controller_setting()
    needs = frozenset({"logits"})
    reads = frozenset({"segments"})

    def sums(self, routing, given, params):
        """The cross entropy of all pairs."""
        steep_TE = self.steepness * routing.logits_TE[..., : routing.num_experts]
        steep_BLE = steep_TE.reshape(-1, given.length, steep_TE.shape[-1])
        segment_BL = given.segment_id_T.reshape(-1, given.length)
        first_BLE, second_BLE = steep_BLE[:, :-1], steep_BLE[:, 1:]
        pair_BL = (segment_BL[:, :-1] == segment_BL[:, 1:]) & (segment_BL[:, 1:] > 0)
        loss_BLE = jax.nn.softplus(first_BLE) - jax.nn.sigmoid(second_BLE) * first_BLE
        return {"pairs": jnp.sum(jnp.where(pair_BL, jnp.mean(loss_BLE, axis=-1), 0.0))}

    def value(self, sums, tokens):
        """The mean over tokens."""
        return sums["pairs"] / tokens
