"""Adaptive mixtures of local experts (Jacobs, Jordan, Nowlan and Hinton, 1991): three objectives.

All are functions of a gate's logits and of what the experts say of a token, whatever experts are:
the likelihood of a mixture combines log-likelihoods, so it serves regression and classification
alike.

Axis legend: T tokens, E experts, D width of an output; any axes may stand in front.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def mixture_loss(
    logits_TE: Float[Array, "*T E"], log_likelihood_TE: Float[Array, "*T E"]
) -> Float[Array, "*T"]:
    """-log sum_e p_e exp(log-likelihood of expert e), p the softmax of the logits.

    Its gradients are p - h for the logits and -h for the log-likelihoods, h the
    :func:`responsibilities`: experts learn from what they explain, and so compete.
    """
    gate_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    return -jax.nn.logsumexp(gate_TE + log_likelihood_TE, axis=-1)


def responsibilities(
    logits_TE: Float[Array, "*T E"], log_likelihood_TE: Float[Array, "*T E"]
) -> Float[Array, "*T E"]:
    """Posterior probability of each expert, given the target: h_e ~ p_e exp(log-likelihood)."""
    return jax.nn.softmax(logits_TE + log_likelihood_TE, axis=-1)


def competitive_loss(
    logits_TE: Float[Array, "*T E"], error_TE: Float[Array, "*T E"]
) -> Float[Array, "*T"]:
    """sum_e p_e error_e: an expert is chosen at random, and its own error counts."""
    return jnp.sum(jax.nn.softmax(logits_TE, axis=-1) * error_TE, axis=-1)


def cooperative_loss(
    logits_TE: Float[Array, "*T E"],
    output_TED: Float[Array, "*T E D"],
    target_TD: Float[Array, "*T D"],
) -> Float[Array, "*T"]:
    """||y - sum_e p_e o_e||^2: experts together make up for each other's errors."""
    return jnp.sum(jnp.square(target_TD - blended(logits_TE, output_TED)), axis=-1)


def blended(
    logits_TE: Float[Array, "*T E"], output_TED: Float[Array, "*T E D"]
) -> Float[Array, "*T D"]:
    """sum_e p_e o_e, the output of a mixture."""
    return jnp.sum(jax.nn.softmax(logits_TE, axis=-1)[..., None] * output_TED, axis=-2)


def squared_error(
    output_TED: Float[Array, "*T E D"], target_TD: Float[Array, "*T D"]
) -> Float[Array, "*T E"]:
    """||y - o_e||^2 of every expert; a Gaussian log-likelihood is -1/2 of it."""
    return jnp.sum(jnp.square(target_TD[..., None, :] - output_TED), axis=-1)
