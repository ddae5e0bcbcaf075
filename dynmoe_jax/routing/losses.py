"""Losses that shape a router: pure functions of a :class:`Routing`.

All are means over the valid tokens of the trailing T axis and leave axes in front of it (layers)
alone, so a stack of layers gives a vector of losses.  Padding tokens count nowhere; with no valid
token a loss is 0.

Each is a function of sums over tokens (:class:`LossSums`), which add up: over devices, where the
partitioner adds them, and over microbatches.  So a loss is that of the whole batch, however the
batch is cut: an expert that is busy on one device and idle on all others is not overloaded.

The statistics follow one notation: ``f_e`` is the share of tokens that chose expert e (no
gradient), ``Q_e`` the mean router probability of expert e.

Axis legend: T tokens, E experts; * axes in front (layers).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.routing.record import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over valid tokens, of which the losses are made.

    Attributes:
      chosen_E: tokens that chose each expert, float32, without gradient.
      first_E: tokens whose most probable choice each expert is, likewise.
      probs_E: router probabilities.
      entropy: entropies of the router's distributions, nats.
      squared_z: squared logsumexp of the logits.
      tokens: valid tokens.
    """

    chosen_E: Float[Array, "* E"]
    first_E: Float[Array, "* E"]
    probs_E: Float[Array, "* E"]
    entropy: Float[Array, "*"]
    squared_z: Float[Array, "*"]
    tokens: Float[Array, ""]

    @property
    def divisor(self) -> Float[Array, ""]:
        """Valid tokens, or 1 if there are none."""
        return jnp.maximum(self.tokens, 1)


def loss_sums(routing: Routing, valid_T: Bool[Array, "T"]) -> LossSums:
    """The sums of T tokens; those that are not valid count nowhere."""

    def over_tokens(value_TX):
        # where, not a product: a padding token may hold NaN.
        return jnp.sum(jnp.where(valid_T[:, None], value_TX, 0.0), axis=-2)

    def chosen_E(routing):
        return jax.lax.stop_gradient(over_tokens(routing.chosen_TE.astype(jnp.float32)))

    # Slots are filled from the most probable expert down.
    first = dataclasses.replace(routing, expert_TK=routing.expert_TK[..., :1])
    # From logits: log p stays finite where p underflows to 0.
    log_z_T1 = jax.nn.logsumexp(routing.logits_TE, axis=-1, keepdims=True)
    entropy_TE = -routing.probs_TE * (routing.logits_TE - log_z_T1)
    return LossSums(
        chosen_E=chosen_E(routing),
        first_E=chosen_E(first),
        probs_E=over_tokens(routing.probs_TE),
        entropy=jnp.sum(over_tokens(entropy_TE), axis=-1),
        squared_z=over_tokens(jnp.square(log_z_T1))[..., 0],
        tokens=jnp.sum(valid_T, dtype=jnp.float32),
    )


def balance_loss(sums: LossSums, normalize: str = "sum") -> Float[Array, "*"]:
    """E sum_e f_e Q_e, the load-balancing loss (Switch eq. 4; Top-P paper eq. 5).

    With ``"sum"``, f counts every chosen expert, so the loss equals the mean number of experts per
    token when load and probabilities are even: it presses on the count as well.

    Args:
      sums: of the tokens.
      normalize: how f counts: ``"sum"`` (every choice), ``"per_choice"`` (every choice, divided
        by the mean number of choices) or ``"first_choice_only"`` (GShard).

    Raises:
      ValueError: another ``normalize``.
    """
    counts_E = {
        "sum": sums.chosen_E,
        "per_choice": sums.chosen_E,
        "first_choice_only": sums.first_E,
    }.get(normalize)
    if counts_E is None:
        raise ValueError(f"normalize={normalize!r} must be sum, per_choice or first_choice_only.")
    share_E = counts_E / sums.divisor
    if normalize == "per_choice":
        share_E = share_E / jnp.maximum(jnp.sum(share_E, axis=-1, keepdims=True), 1e-9)
    return share_E.shape[-1] * jnp.sum(share_E * sums.probs_E / sums.divisor, axis=-1)


def entropy_loss(sums: LossSums) -> Float[Array, "*"]:
    """Mean entropy of the router's distribution in nats, the "dynamic loss" (Top-P paper eq. 4).

    It keeps the router from buying quality with flat distributions, which use many experts.
    """
    return sums.entropy / sums.divisor


def router_z_loss(sums: LossSums) -> Float[Array, "*"]:
    """Mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return sums.squared_z / sums.divisor
