"""Batches: the endless training stream, and one pass over a domain's held-out text."""

import functools
import itertools
import json
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dynmoe_jax import config
from dynmoe_jax.data.corruption.rows import LEAST
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.mixture import is_proportional, parse_cap, proportional_counts
from dynmoe_jax.data.moving_mixture import Moving
from dynmoe_jax.data.packing import check_weights, pack, shard_rows
from dynmoe_jax.data.part import part_of
from dynmoe_jax.data.preparation.prepare import Prepared
from dynmoe_jax.data.shards import RowsInTurn
from dynmoe_jax.data.sources.registry import parse_weights
from dynmoe_jax.data.tokenizers.api import Tokenizer
from dynmoe_jax.registry import chosen

# int32 arrays [B, L]: tokens, targets, segment_ids (0 = padding), positions.
BATCH_ARRAYS = ("tokens", "targets", "segment_ids", "positions")
"""Names of the arrays of a batch, each int32 [B, L]."""

Batch = dict[str, np.ndarray]

_BATCHES_AHEAD = 4
_LATER = ("documents", "corruption", "reweighting")
"""Parts of the identity that positions of earlier versions lack."""


class TrainStream:
    """Endless training batches, made in one background thread, ready to stop and go on anywhere.

    The rows and their order depend on the data, the tokenizer, the seed, ``seq_len``,
    ``domain_weights``, ``shuffle_tokens``, ``virtual_shards`` and ``corruption``, and on nothing
    else: not on the batch size, not on who reads which shards.  Two things may change on the way:
    the step with which corruption ends, which the batch size makes a row of, and weights that
    :meth:`move_weights` moves.  Within a batch that all shards have the same share of, the rows are
    sorted by shard, so that a reader of neighbouring shards (:func:`shards_of_rows`) holds a block
    of the batch, as the devices of a process do.

    Args:
      prepared: the data.
      tokenizer: its tokenizer.
      data: the settings.
      batch_size: rows of a batch, over all readers.
      seed: of the order.
      shard_ids: the virtual shards to read here; None for all of them.  A reader of some gets
        their rows only: batches of ``batch_size * len(shard_ids) / virtual_shards`` rows.
      arrays: that a batch has besides :data:`BATCH_ARRAYS`, as an objective needs them.

    Raises:
      DataError: the domain weights don't fit the data, or the batch cannot be divided among the
        readers.
      ValueError: ``shard_ids`` is empty or holds a number that is no shard's.
    """

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: Tokenizer,
        data: config.Data,
        batch_size: int,
        seed: int,
        shard_ids: Collection[int] | None = None,
        arrays: Collection[str] = (),
    ):
        by_examples = is_proportional(data.domain_weights)
        weights = _weights(prepared, data, by_examples)
        self._identity = {
            "data": prepared.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "seq_len": data.seq_len,
            "domain_weights": (
                data.domain_weights if by_examples else parse_weights(data.domain_weights)
            ),
            "virtual_shards": data.virtual_shards,
            "shuffle_tokens": data.shuffle_tokens,
            "corruption": data.corruption,
            "reweighting": data.reweighting,
        }
        if prepared.content:
            self._identity["documents"] = prepared.content
        numbers = range(data.virtual_shards) if shard_ids is None else sorted(set(shard_ids))
        rows = _rows_here(batch_size, data.virtual_shards, numbers)
        if data.part:
            self._identity["part"] = data.part
        documents = {
            domain: part_of(prepared.open_train(domain), data.part, domain)
            for domain in prepared.domains
        }
        # Of a small corpus, about a quarter of an epoch at most: a window is filled before its
        # first row comes out.
        epoch = sum(amount.bytes for amount in prepared.train.values())
        shuffled = min(data.shuffle_tokens, epoch // 16)
        window = max(1, shuffled // (data.seq_len * data.virtual_shards))
        self.reference: dict[str, float] | None = None
        """Losses by domain that :mod:`dynmoe_jax.training.domain_weights` compares with; a part of
        the position, so that a run needs what it has them from only once."""
        rows_of = functools.partial(shard_rows, documents, weights, tokenizer, data.seq_len, seed)
        kind = {"by_examples": by_examples, "arrays": tuple(arrays)}
        kind["moving"] = _moving(data, tokenizer, batch_size)
        shards = {n: rows_of(n, data.virtual_shards, window, **kind) for n in numbers}
        batches = RowsInTurn(shards, data.virtual_shards).batch(rows, drop_remainder=True)
        batches = batches.map(functools.partial(_by_shard, len(shards)))
        ahead = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=_BATCHES_AHEAD
        )
        # Ends the thread when the stream is dropped or the interpreter shuts down.  Nothing else
        # refers to the iterator: Grain's own __del__ fails when it runs late in a shutdown.
        self._open = [iter(ahead)]
        self._finalizer = weakref.finalize(self, _close, self._open)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator())

    def __enter__(self) -> "TrainStream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the background thread; the stream cannot be read any more."""
        self._finalizer()

    def _iterator(self) -> grain.DatasetIterator:
        if not self._open:
            raise ValueError("The stream is closed.")
        return self._open[0]

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was taken, JSON-able."""
        state = {**self._identity, "position": self._iterator().get_state()}
        if self.reference is not None:
            state["reference"] = self.reference
        return json.loads(json.dumps(state))

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position; the next batches are those that came after it.

        Args:
          state: of a reader of at least the shards that are read here: one of the same shards, of
            all of them, or several put together by :func:`merge_states`.

        Raises:
          DataError: the position belongs to other data or other settings.
        """
        for name, now in self._identity.items():
            if state.get(name, now if name in _LATER else None) != now:
                raise _other_stream(name, state.get(name), now)
        self._iterator().set_state(state["position"])
        self.reference = state.get("reference")

    @property
    def domain_weights(self) -> dict[str, float]:
        """Shares of the next rows by domain, which add up to 1, where they may move."""
        shards = self._iterator().get_state()["shards"]
        return dict(next(iter(shards.values()))["weights"])

    def move_weights(self, weights: Mapping[str, float]) -> None:
        """Has the rows from here on mixed by other weights; batches made ahead are made again.

        Args:
          weights: of the domains of :attr:`domain_weights`; they add up to 1.
        """
        position = self._iterator().get_state()
        shards = {n: {**s, "weights": dict(weights)} for n, s in position["shards"].items()}
        self._iterator().set_state({**position, "shards": shards})


def shards_of_rows(rows: Collection[int], batch_size: int, virtual_shards: int) -> list[int]:
    """The virtual shards that some rows of every batch come from.

    Args:
      rows: numbers of rows in a batch, e.g. of those that the devices of a process hold.
      batch_size: rows of a whole batch.
      virtual_shards: their number.

    Returns:
      the shards, rising; all of them where a batch has not the same number of rows of each.
    """
    if batch_size % virtual_shards:
        return list(range(virtual_shards))
    return sorted({int(row) // (batch_size // virtual_shards) for row in rows})


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One position of the states that several readers have after the same number of batches.

    It is what a reader of all shards would have there, so that any number of readers can go on.
    A shard that several of them read stands alike in all their states.

    Raises:
      ValueError: a shard is missing, or the states are not of one stream or one moment.
    """
    positions = [state["position"] for state in states]
    count = states[0]["virtual_shards"]
    merged: dict[str, Any] = {}
    for position in positions:
        for number, shard in position["shards"].items():
            if merged.setdefault(number, shard) != shard:
                raise ValueError(f"The states hold shard {number} at different positions.")
    if sorted(map(int, merged)) != list(range(count)):
        raise ValueError(f"The states hold the shards {sorted(merged)}, not all of {count}.")
    identities = [{k: v for k, v in state.items() if k != "position"} for state in states]
    if any(identity != identities[0] for identity in identities):
        raise ValueError("The states are not of one stream.")
    # Whoever reads the last shard has read to the end of the batch.
    row = max(position["row"] for position in positions)
    return {**identities[0], "position": {"row": row, "shards": merged}}


def heldout_batches(
    prepared: Prepared,
    tokenizer: Tokenizer,
    data: config.Data,
    domain: str,
    batch_size: int,
    max_batches: int,
) -> Iterator[Batch]:
    """Batches of a domain's held-out text, the same at every call.

    Without ``max_batches`` every token would come once.  The last batch is filled up with padding
    (segment id 0).  A domain without held-out text gives no batch.

    Args:
      prepared: the data.
      tokenizer: its tokenizer.
      data: the settings.
      domain: one of ``prepared.domains``.
      batch_size: rows of a batch.
      max_batches: where to stop.
    """
    return document_batches(prepared.open_heldout(domain), tokenizer, data, batch_size, max_batches)


def document_batches(
    documents: Sequence[dict],
    tokenizer: Tokenizer,
    data: config.Data,
    batch_size: int,
    max_batches: int,
    seed: int | None = None,
) -> Iterator[Batch]:
    """Batches of documents, as :func:`heldout_batches`; with a seed in an order that it draws."""
    if not len(documents):
        return iter(())
    source = grain.MapDataset.source(documents)
    source = source if seed is None else source.shuffle(seed=seed)
    rows = pack(source, tokenizer, data.seq_len)
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    return itertools.islice(iter(rows.batch(batch_size, batch_fn=pad)), max_batches)


def _weights(prepared: Prepared, data: config.Data, by_examples: bool) -> dict[str, float]:
    """Weights by domain: the user's, or the examples that each counts with; where they move, they
    begin with the shares that the domains have."""
    domain_weights = data.domain_weights
    if by_examples:
        examples = {name: amount.documents for name, amount in prepared.train.items()}
        return dict(proportional_counts(examples, parse_cap(domain_weights)))
    weights = parse_weights(domain_weights)
    check_weights(weights, prepared.domains)
    if data.reweighting and not weights:
        return {name: float(amount.bytes) for name, amount in prepared.train.items()}
    return weights


def _moving(data: config.Data, tokenizer: Tokenizer, batch_size: int) -> Moving | None:
    """Changes that a stream goes through; None where it goes through none.

    Raises:
      DataError: the tokenizer cannot serve, or rows are too short.
    """
    if not data.corruption:
        return Moving() if data.reweighting else None
    if data.seq_len < LEAST:
        raise DataError(
            f"config.data.seq_len={data.seq_len} is too short for config.data.corruption="
            f"{data.corruption!r}, which needs {LEAST} tokens; raise it."
        )
    kind = chosen(data, "corruption")
    setting = f"config.data.{data.corruption}.until_step={kind.until_step}"
    refusal = (
        f"{setting} would change batches that the run has been trained on; set it to what it was, "
        "or, as long as the run is before it, to a step that is still to come."
    )
    return Moving(kind.prepared(tokenizer), kind.until_step * batch_size, refusal)


def _by_shard(shards: int, batch: Batch) -> Batch:
    """Rows that came from the shards in turn, sorted by shard; as they are if they don't divide."""
    rows = len(batch["tokens"])
    if rows % shards:
        return batch
    return {
        name: array.reshape(-1, shards, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        for name, array in batch.items()
    }


def _close(iterators: list[grain.DatasetIterator]) -> None:
    iterators.pop().close()


def _rows_here(batch_size: int, num_shards: int, numbers: Collection[int]) -> int:
    if not numbers or min(numbers) < 0 or max(numbers) >= num_shards:
        raise ValueError(f"shard_ids={list(numbers)} must be some of 0..{num_shards - 1}.")
    if len(numbers) == num_shards:
        return batch_size
    if batch_size % num_shards:
        raise DataError(
            f"config.train.batch_size={batch_size} must be a multiple of "
            f"config.data.virtual_shards={num_shards} where several processes share a batch."
        )
    return batch_size // num_shards * len(numbers)


def _other_stream(name: str, then: Any, now: Any) -> DataError:
    if name == "data":
        what = "other data (config.data.sources, its files, or how they are read have changed)"
    elif name == "documents":
        what = (
            "other documents, although the settings are the same (the Python installation or the "
            "TFDS data set that they were prepared from has changed)"
        )
    elif name == "tokenizer":
        what = "another tokenizer (config.data.tokenizer)"
    else:
        setting = "config.seed" if name == "seed" else f"config.data.{name}"
        what = f"{setting}={then!r}, which is now {now!r}"
    return DataError(
        f"The position in the data belongs to {what}; set it back, or start in another --workdir."
    )
