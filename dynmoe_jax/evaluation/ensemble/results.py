"""Results of an ensemble on the text of domains: losses, posteriors, the bound, the prior.

Axis legend: J members, R rows, L positions, D documents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dynmoe_jax.evaluation.ensemble.scores import Scores
from dynmoe_jax.inference.ensemble.posterior import (
    PRIOR_DOCUMENTS,
    before_each_token,
    log_posterior,
    loss_bound,
    mixture,
    moving_average,
    uniform,
)

SURE = 0.9
"""Posterior from which on a member is called certain."""

_SHOWN = [n * 10**power for power in range(5) for n in (1, 2, 5)]
SHOWN_POSITIONS = (0, *_SHOWN)
"""Tokens read at which posteriors are shown."""


def results_of(
    scores: Mapping[str, Scores], log_prior_J: Float[np.ndarray, "J"] | None, top_k: int = 0
) -> dict[str, Any]:
    """Results of an ensemble, for JSON and pages.

    Args:
      scores: by domain.
      log_prior_J: of the members; None: estimated by domain, see :func:`estimated_prior`.
      top_k: members that keep their weight at each token; 0: all.
    """
    domains = {name: _of_domain(each, log_prior_J, top_k) for name, each in scores.items()}
    total = _added(list(domains.values()))
    record = {"all": _per_token(total), "domains": {n: _per_token(d) for n, d in domains.items()}}
    record["prior"] = np.mean([domain["prior"] for domain in domains.values()], axis=0)
    return record


def estimated_prior(scores: Scores) -> tuple[Float[np.ndarray, "J"], int]:
    """(prior of the members on a domain, documents from its beginning that it was estimated from).

    The moving average of the posteriors behind at most 100 documents, each begun with a uniform
    prior.  Those are half of them at most, and are not evaluated: uniform where there is but one.
    """
    loglik_JD = np.stack([scores.of_documents(one_RL) for one_RL in scores.loglik_JRL])
    members, documents = loglik_JD.shape
    taken = min(PRIOR_DOCUMENTS, documents // 2)
    if not taken:
        return np.full(members, 1 / members), 0
    posterior_JD = np.exp(log_posterior(loglik_JD[:, :taken], uniform(members)))
    return moving_average(posterior_JD), taken


def _of_domain(scores: Scores, log_prior_J, top_k: int) -> dict[str, Any]:
    """Sums over a domain's tokens, those behind the documents of an estimated prior."""
    taken = 0
    if log_prior_J is None:
        prior_J, taken = estimated_prior(scores)
        log_prior_J = np.log(np.maximum(prior_J, np.finfo(float).tiny))
    here_RL = scores.valid_RL & (scores.document_RL >= taken)
    before_JRL = before_each_token(scores.loglik_JRL, scores.position_RL)
    log_JRL = log_posterior(before_JRL, log_prior_J, top_k)
    posterior_JRL = np.exp(log_JRL)
    documents = len(np.unique(scores.document_RL[here_RL]))
    return {
        "documents": documents,
        "documents_of_prior": taken,
        "tokens": int(here_RL.sum()),
        "bytes": int(scores.bytes_RL[here_RL].sum()),
        "nll": -float(mixture(log_JRL, scores.loglik_JRL)[here_RL].sum()),
        "nll_by_member": -scores.loglik_JRL[:, here_RL].sum(axis=1),
        "prior": np.exp(log_prior_J),
        "posterior": posterior_JRL[:, here_RL].mean(axis=1),
        "posterior_by_position": _by_position(posterior_JRL, scores.position_RL, here_RL),
        "tokens_until_sure": _tokens_until_sure(scores, posterior_JRL, here_RL),
    }


def _by_position(posterior_JRL, position_RL, here_RL) -> list[dict[str, Any]]:
    """Mean posteriors before the tokens at a few positions, over documents that are so long."""
    found = []
    for position in SHOWN_POSITIONS:
        at_RL = here_RL & (position_RL == position)
        if count := int(at_RL.sum()):
            mean_J = posterior_JRL[:, at_RL].mean(axis=1)
            found.append({"position": position, "documents": count, "posterior": mean_J})
    return found


def _tokens_until_sure(scores: Scores, posterior_JRL, here_RL) -> float:
    """Median over documents of the tokens read until one member is certain; NaN: never."""
    sure_RL = here_RL & (posterior_JRL.max(axis=0) > SURE)
    first_D = np.full(scores.document_RL.max() + 1, np.inf)
    np.minimum.at(first_D, scores.document_RL[sure_RL], scores.position_RL[sure_RL])
    median = float(np.median(first_D[np.unique(scores.document_RL[here_RL])]))
    return median if np.isfinite(median) else np.nan


_SUMS = ("documents", "documents_of_prior", "tokens", "bytes", "nll", "nll_by_member")


def _added(domains: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(domain[name] for domain in domains) for name in _SUMS}


def _per_token(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Sums with what follows from them; the bound is that of an ensemble of all members."""
    nats_per_bit_of_text = np.log(2) * max(1, sums["bytes"])
    tokens = max(1, sums["tokens"])
    found = {
        **sums,
        "loss": sums["nll"] / tokens,
        "loss_by_member": sums["nll_by_member"] / tokens,
        "bits_per_byte": sums["nll"] / nats_per_bit_of_text,
        "bits_per_byte_by_member": sums["nll_by_member"] / nats_per_bit_of_text,
    }
    if "prior" in sums:
        with np.errstate(divide="ignore"):
            log_prior_J = np.log(sums["prior"])
        length = tokens / max(1, sums["documents"])
        found["loss_bound"] = loss_bound(found["loss_by_member"], log_prior_J, length)
    return found
