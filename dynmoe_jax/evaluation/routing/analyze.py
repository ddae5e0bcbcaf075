"""The pass over held-out text of a run's checkpoints.

Axis letters: N MoE layers, X the first tokens that were read, E experts.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from flax import nnx
from jaxtyping import Int

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import Batch, Tokenizer
from dynmoe_jax.data.packing import pack
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
from dynmoe_jax.evaluation.routing import statistics
from dynmoe_jax.evaluation.routing.gather import RoutingSums, TokenUse
from dynmoe_jax.evaluation.routing.record import to_record
from dynmoe_jax.evaluation.routing.sums import Documents, GroupedMeans
from dynmoe_jax.model import decoder_structure

COMPARED_TOKENS = 1 << 16
"""Tokens whose first choices are kept, to be compared with those of the next checkpoint."""

Batches = Callable[[], dict[str, Iterable[Batch]]]
"""Makes the batches of every domain anew."""


class Analysis:
    """Result of one pass over a checkpoint's tokens: sums, and the first choices of a few.

    Args:
      model: of the run; it has MoE layers.
      domains: in the order in which they are read.
      length: L, positions of a row.
      tokenizer: of the text.
    """

    def __init__(self, model: config.Model, domains: list[str], length: int, tokenizer: Tokenizer):
        settings = model.moe_settings
        experts_N = [moe.num_experts for moe in settings]
        slots_N = [moe.route.bounds(moe.num_experts).slots for moe in settings]
        self._model = model
        self.sums = RoutingSums(domains, experts_N, slots_N, length, tokenizer)
        self._firsts: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        # Some tokens of every domain.
        self._room = {domain: compared_tokens(len(domains)) for domain in domains}

    def watch(self, domain: str, batch: Batch, use: TokenUse, load_NE: np.ndarray) -> None:
        """Counts a batch; see :data:`dynmoe_jax.evaluation.heldout.Watch`."""
        self.sums.add(domain, batch, use, load_NE)
        if room := self._room[domain]:
            document_T, first_NT = self.sums.latest
            self._numbers.append(document_T[:room])
            self._firsts.append(first_NT[:, :room].astype(np.int16))
            self._room[domain] -= self._firsts[-1].shape[1]

    def record(self) -> dict[str, Any]:
        """Record of the sums, for JSON and pages."""
        return to_record(self.sums, self._model.looks_ahead)

    @property
    def first_NX(self) -> Int[np.ndarray, "N X"]:
        """First choices of the first tokens."""
        return np.concatenate(self._firsts, axis=1)

    @property
    def document_X(self) -> Int[np.ndarray, "X"]:
        """Their documents."""
        return np.concatenate(self._numbers)


def agreement(
    before: Int[np.ndarray, "N X"],
    after: Int[np.ndarray, "N X"],
    document_X: Int[np.ndarray, "X"],
    experts: int,
) -> dict[str, Any]:
    """How often two checkpoints agree on the first choices of the same tokens, by layer.

    Args:
      before: first choices, -1: none.
      after: of the later checkpoint.
      document_X: documents of the tokens, rising.
      experts: E.
    """
    layers, tokens = before.shape
    means = GroupedMeans(layers)
    documents = Documents.numbered(document_X).repeated(layers)
    chosen_NX = (before >= 0) | (after >= 0)
    group_NX = np.where(chosen_NX, np.arange(layers)[:, None], -1)
    means.add(documents, group_NX.reshape(-1), (before == after).reshape(-1).astype(float))
    count = functools.partial(np.bincount, minlength=experts)
    return {
        "tokens": tokens,
        "by_layer": [estimate.record() for estimate in means.estimates()],
        "chance_by_layer": [
            statistics.chance_agreement(count(first[first >= 0]), count(then[then >= 0]))
            for first, then in zip(before, after, strict=True)
        ],
    }


def analyze(
    model: config.Model,
    loss: config.Loss,
    *,
    checkpoints: Sequence[tuple[int, Callable[[], nnx.State]]],
    batches: Batches,
    length: int,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """The record of the last checkpoint, and how it came to be.

    Args:
      model: of the run.
      loss: its settings, for the size of chunks.
      checkpoints: (step, reads the parameters), rising; of all but the last only as many tokens are
        read as are compared.
      batches: of the text.
      length: L, positions of a row.
      tokenizer: of the text.
    """
    step = make_eval_step(decoder_structure(model), loss)
    pairs, before = [], None
    for number, read in checkpoints:
        last = number == checkpoints[-1][0]
        title = f"Routing held-out text, step {number:,}"
        made = batches()
        found = Analysis(model, list(made), length, tokenizer)
        with stage(title, unit="tokens") as shown:

            def watch(domain, batch, use, load_NE, found=found, shown=shown):
                found.watch(domain, batch, use, load_NE)
                shown.advance(int((batch["segment_ids"] > 0).sum()))

            most = compared_tokens(len(made))
            read_here = made if last else {name: _first(made[name], most) for name in made}
            evaluate(step, read(), read_here, tokenizer.token_bytes_V, watch=watch)
        if before is not None:
            experts = max(found.sums.experts_N)
            pair = agreement(before[1], found.first_NX, found.document_X, experts)
            pairs.append({"from": before[0], "to": number} | pair)
        before = number, found.first_NX
    return found.record() | {"step": number, "agreement": pairs}


def compared_tokens(domains: int) -> int:
    """Tokens of each domain whose choices are compared."""
    return max(1, COMPARED_TOKENS // max(1, domains))


def _first(batches: Iterable[Batch], most: int) -> Iterator[Batch]:
    """The batches up to so many tokens, the last one whole."""
    for batch in batches:
        yield batch
        most -= int((batch["segment_ids"] > 0).sum())
        if most <= 0:
            return


def packed(
    by_domain: Mapping[str, Sequence[Mapping[str, bytes]]],
    tokenizer: Tokenizer,
    length: int,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Iterator[Batch]]:
    """Batches of every domain's documents; the last one is filled up with padding.

    Args:
      by_domain: documents, each with a ``text`` and an ``origin`` in UTF-8.
      tokenizer: of the text.
      length: L, positions of a row.
      batch_size: rows.
      limit: documents of each domain at the most.
    """
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)

    def batches(documents):
        rows = pack(grain.MapDataset.source(documents)[:limit], tokenizer, length)
        return iter(rows.batch(batch_size, batch_fn=pad))

    return {domain: batches(documents) for domain, documents in by_domain.items() if len(documents)}


def read_by_domain(
    documents: Iterable[Document | Broken], limit: int | None
) -> dict[str, list[dict[str, bytes]]]:
    """The documents of a source by domain, so many of each; what is broken is left out."""
    found: dict[str, list[dict[str, bytes]]] = {}
    for document in documents:
        if isinstance(document, Document):
            of_domain = found.setdefault(document.domain, [])
            if limit is None or len(of_domain) < limit:
                text, origin = document.text.encode(), document.origin.encode()
                of_domain.append({"text": text, "origin": origin})
    return dict(sorted(found.items()))
