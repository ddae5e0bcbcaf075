"""Domain posterior of an ensemble (Branch-Train-Merge, arXiv 2208.03306, section 2.2).

    p(x_t | x_<t) = sum_j p(x_t | x_<t, D=j) p(D=j | x_<t)
    p(D=j | x_<t) = p(x_<t | D=j) p(D=j) / sum_i p(x_<t | D=i) p(D=i)

Functions of log-likelihoods, in the type that these have, of NumPy or of JAX: evaluation computes
in float64 on the host, generation in float32 on the device.

Axis legend: J members, B batch, L positions, X any axes behind J, D documents.
"""

import numpy as np
from jaxtyping import Array, Float, Int

PRIOR_DOCUMENTS = 100
"""Documents that a prior is estimated from, at most."""

PRIOR_DECAY = 0.3
"""Weight of the newest document in the moving average that is the prior (alpha)."""

Numbers = Array | np.ndarray


def log_posterior(
    loglik_JX: Float[Numbers, "J X"], log_prior_J: Float[Numbers, "J"], top_k: int = 0
) -> Float[Numbers, "J X"]:
    """Logarithm of the posterior of each member.

    Args:
      loglik_JX: of the text so far, summed over its tokens, under each member.
      log_prior_J: of the members; -inf leaves one out.
      top_k: members that keep their weight, the most probable ones; 0: all.  Of equal ones those
        that come first.
    """
    xp = loglik_JX.__array_namespace__()
    log_JX = loglik_JX + log_prior_J.reshape(-1, *[1] * (loglik_JX.ndim - 1))
    if 0 < top_k < len(log_JX):
        order_JX = xp.argsort(-log_JX, axis=0, stable=True)
        rank_JX = xp.argsort(order_JX, axis=0, stable=True)
        log_JX = xp.where(rank_JX < top_k, log_JX, -np.inf)
    return log_JX - _log_sum(log_JX)


def mixture(
    log_posterior_JX: Float[Numbers, "J X"], loglik_JX: Float[Numbers, "J X"]
) -> Float[Numbers, "X"]:
    """Log-likelihood under the ensemble, from those of one token under each member."""
    return _log_sum(log_posterior_JX + loglik_JX)


def before_each_token(
    loglik_JBL: Float[Numbers, "J B L"], position_BL: Int[Numbers, "B L"]
) -> Float[Numbers, "J B L"]:
    """Log-likelihood of what stands before each token in its document.

    Args:
      loglik_JBL: of each token.
      position_BL: 0, 1, … in each document of a row; so each begins with nothing before it.
    """
    xp = loglik_JBL.__array_namespace__()
    before_JBL = xp.cumsum(loglik_JBL, axis=-1) - loglik_JBL
    first_BL = xp.maximum(xp.arange(position_BL.shape[1]) - position_BL, 0)
    first_JBL = xp.broadcast_to(first_BL[None], before_JBL.shape)
    return before_JBL - xp.take_along_axis(before_JBL, first_JBL, axis=-1)


def uniform(members: int) -> Float[np.ndarray, "J"]:
    """Logarithm of the prior that prefers no member."""
    return np.full(members, -np.log(members))


def moving_average(posterior_JD: Float[np.ndarray, "J D"]) -> Float[np.ndarray, "J"]:
    """Prior estimated from the posteriors behind documents: y_0 = x_0, y_d = (1 - a) y_(d-1) + a
    x_d, with a = :data:`PRIOR_DECAY`; the last one.

    Args:
      posterior_JD: in the order in which the documents were read, at least one.
    """
    average_J = posterior_JD[:, 0]
    for posterior_J in posterior_JD.T[1:]:
        average_J = (1 - PRIOR_DECAY) * average_J + PRIOR_DECAY * posterior_J
    return average_J


def loss_bound(
    loss_J: Float[np.ndarray, "J"], log_prior_J: Float[np.ndarray, "J"], tokens_per_document: float
) -> float:
    """Nats per token that the ensemble of all members cannot exceed.

    A mixture holds each member with its prior, and pays for not knowing which one once a document:
    the least of loss_j - log p(D=j) / n.

    Args:
      loss_J: nats per token of each member.
      log_prior_J: of the members.
      tokens_per_document: n, mean tokens of a document.
    """
    return float(np.min(loss_J - log_prior_J / tokens_per_document))


def _log_sum(log_JX: Float[Numbers, "J X"]) -> Float[Numbers, "X"]:
    """log sum exp over the members, of which one at least is not -inf."""
    xp = log_JX.__array_namespace__()
    largest_X = xp.max(log_JX, axis=0)
    return largest_X + xp.log(xp.sum(xp.exp(log_JX - largest_X), axis=0))
