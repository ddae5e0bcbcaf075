"""Losses that shape a router: pure functions of a :class:`Routing`.

All are means over the valid tokens of the trailing T axis and leave axes in front of it (layers)
alone, so a stack of layers gives a vector of losses.  Padding tokens count nowhere; with no valid
token a loss is 0.

The statistics follow one notation: ``f_e`` is the share of tokens that chose expert e (no
gradient), ``Q_e`` the mean router probability of expert e.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.routing.record import Routing


def _mean_over_tokens(
    value: Float[Array, "*N T E"], valid_T: Bool[Array, "T"]
) -> Float[Array, "*N E"]:
    """Mean over the valid tokens of the T axis, which is second to last."""
    # where, not a product: a padding token may hold NaN.
    total = jnp.sum(jnp.where(valid_T[:, None], value, 0.0), axis=-2)
    return total / jnp.maximum(jnp.sum(valid_T), 1)


def balance_loss(
    routing: Routing, valid_T: Bool[Array, "T"], *, normalise: str = "sum"
) -> Float[Array, "*N"]:
    """E sum_e f_e Q_e, the load-balance loss (Switch eq. 4; Top-P paper eq. 5).

    With ``"sum"``, f counts every chosen expert, so the loss equals the mean number of experts per
    token when load and probabilities are even: it presses on the count as well.

    Args:
      routing: the routing of T tokens.
      valid_T: False for padding.
      normalise: how f counts: ``"sum"`` (every choice), ``"per_choice"`` (every choice, divided
        by the mean number of choices) or ``"first_choice_only"`` (GShard).

    Raises:
      ValueError: another ``normalise``.
    """
    if normalise == "first_choice_only":
        # Slots are filled from the most probable expert down.
        first = dataclasses.replace(routing, expert_TK=routing.expert_TK[..., :1])
        share_E = _mean_over_tokens(first.chosen_TE.astype(jnp.float32), valid_T)
    elif normalise in ("sum", "per_choice"):
        share_E = _mean_over_tokens(routing.chosen_TE.astype(jnp.float32), valid_T)
    else:
        raise ValueError(f"normalise={normalise!r} must be sum, per_choice or first_choice_only.")
    share_E = jax.lax.stop_gradient(share_E)
    if normalise == "per_choice":
        share_E = share_E / jnp.maximum(jnp.sum(share_E, axis=-1, keepdims=True), 1e-9)
    probability_E = _mean_over_tokens(routing.probs_TE, valid_T)
    return routing.num_experts * jnp.sum(share_E * probability_E, axis=-1)


def entropy_loss(routing: Routing, valid_T: Bool[Array, "T"]) -> Float[Array, "*N"]:
    """Mean entropy of the router's distribution in nats, the "dynamic loss" (Top-P paper eq. 4).

    It keeps the router from buying quality with flat distributions, which use many experts.
    """
    # From logits: log p stays finite where p underflows to 0.
    log_probs_TE = jax.nn.log_softmax(routing.logits_TE, axis=-1)
    entropy_TE = -routing.probs_TE * log_probs_TE
    return jnp.sum(_mean_over_tokens(entropy_TE, valid_T), axis=-1)


def router_z_loss(routing: Routing, valid_T: Bool[Array, "T"]) -> Float[Array, "*N"]:
    """Mean squared logsumexp of the router logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    z_T1 = jax.nn.logsumexp(routing.logits_TE, axis=-1, keepdims=True)
    return _mean_over_tokens(jnp.square(z_T1), valid_T)[..., 0]
