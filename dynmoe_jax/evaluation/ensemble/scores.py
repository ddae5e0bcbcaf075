"""Log-likelihood of every token of a text under every member of an ensemble.

Axis legend: J members, B batch, L positions, R rows of a domain's whole text, D documents, V
vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import Batch
from dynmoe_jax.evaluation.heldout import make_eval_step
from dynmoe_jax.model import decoder_structure


@dataclasses.dataclass(frozen=True)
class Member:
    """Member of an ensemble, of which nothing is in memory yet.

    Attributes:
      model: its settings.
      params: reads its parameters.
    """

    model: config.Model
    params: Callable[[], nnx.State]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a domain's text.

    Attributes:
      loglik_JRL: log-likelihood in nats of the token that each position predicts; 0 in padding.
      position_RL: 0, 1, … in each document; one that a row cuts begins anew in the next.
      valid_RL: False in padding.
      bytes_RL: UTF-8 bytes that the predicted token stands for.
    """

    loglik_JRL: Float[np.ndarray, "J R L"]
    position_RL: Int[np.ndarray, "R L"]
    valid_RL: Bool[np.ndarray, "R L"]
    bytes_RL: Int[np.ndarray, "R L"]

    @property
    def document_RL(self) -> Int[np.ndarray, "R L"]:
        """Number of each position's document, in the order of the text; -1 before the first."""
        begins_RL = (self.position_RL == 0) & self.valid_RL
        return np.cumsum(begins_RL).reshape(begins_RL.shape) - 1

    def of_documents(self, loglik_RL: Float[np.ndarray, "R L"]) -> Float[np.ndarray, "D"]:
        """The log-likelihood of each document, from those of its tokens."""
        here_RL = self.valid_RL
        return np.bincount(self.document_RL[here_RL], loglik_RL[here_RL])


def score(
    members: Sequence[Member],
    loss: config.Loss,
    batches: Callable[[], Mapping[str, Iterable[Batch]]],
    token_bytes_V: Int[np.ndarray, "V"],
) -> dict[str, Scores]:
    """Scores of every domain; one member is in memory at a time.

    Args:
      members: of the ensemble; those of one shape are compiled once.
      loss: settings of the loss, for the size of chunks.
      batches: makes the batches of every domain anew, the same for all members.
      token_bytes_V: bytes that each token stands for.
    """
    steps, found, texts = {}, [], {}
    for number, member in enumerate(members, 1):
        if member.model not in steps:
            steps[member.model] = make_eval_step(decoder_structure(member.model), loss)
        step, params = steps[member.model], member.params()
        title = f"Scoring text with member {number} of {len(members)}"
        with stage(title, unit="batches") as shown:
            by_domain = {}
            for domain, of_domain in batches().items():
                scored, kept = [], []
                for batch in of_domain:
                    nll_BL = step(params, jax.device_put(batch)).by_token.nll_BL
                    scored.append(-np.asarray(jax.device_get(nll_BL), np.float64))
                    kept.append(batch)
                    shown.advance()
                if kept:
                    by_domain[domain] = np.concatenate(scored)
                    texts.setdefault(domain, kept)
        found.append(by_domain)
        del params
    return {
        domain: _scores(np.stack([one[domain] for one in found]), batches, token_bytes_V)
        for domain, batches in texts.items()
    }


def _scores(loglik_JRL, batches: Sequence[Batch], token_bytes_V) -> Scores:
    joined = {
        name: np.concatenate([batch[name] for batch in batches])
        for name in ("positions", "segment_ids", "targets")
    }
    valid_RL = joined["segment_ids"] > 0
    bytes_RL = np.where(valid_RL, token_bytes_V[joined["targets"]], 0)
    return Scores(np.where(valid_RL, loglik_JRL, 0.0), joined["positions"], valid_RL, bytes_RL)
