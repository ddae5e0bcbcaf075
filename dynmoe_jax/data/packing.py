"""Documents → rows: tokenised, packed to full sequences, in an order that the seed decides.

A document is ``[BOS] + encode(text) + [EOS]``.  Its inputs are all ids but the last, its targets
all but the first, so no pair is lost where a row ends and no target crosses into the next
document.  A row is one sequence of ``seq_len`` positions: int32 arrays ``tokens``, ``targets``,
``segment_ids`` (1, 2, ... for the documents in the row; 0 = padding) and ``positions`` (0, 1, ...
within each segment).
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence

import grain
import numpy as np

from dynmoe_jax.data.chat import responses
from dynmoe_jax.data.corruption.rows import CorruptedRows
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.moving_mixture import DomainRows, Moving, MovingMixture
from dynmoe_jax.data.tokenizers.api import Tokenizer

# Reading and tokenising happen in the thread that asks; the whole stream has one of its own.
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def pack(
    documents: grain.MapDataset, tokenizer: Tokenizer, seq_len: int, arrays: Collection[str] = ()
) -> grain.IterDataset:
    """Rows of the documents in their order; only the last row of a finite stream has padding.

    Args:
      documents: with a ``text`` in UTF-8.
      tokenizer: of the text.
      seq_len: tokens of one row.
      arrays: that a row has besides; ``responses`` says of targets whether they belong to one.
    """
    make = functools.partial(_pairs, tokenizer, responses.NAME in arrays)
    pairs = documents.map(make).to_iter_dataset(_IN_THIS_THREAD)
    lengths = dict.fromkeys(("tokens", "targets", *arrays), seq_len)
    packed = grain.experimental.ConcatThenSplitIterDataset(pairs, length_struct=lengths)
    return packed.map(functools.partial(_row, arrays))


def shard_rows(
    documents: Mapping[str, Sequence],
    weights: Mapping[str, float],
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    shard: int,
    num_shards: int,
    window: int,
    by_examples: bool = False,
    arrays: Collection[str] = (),
    moving: Moving | None = None,
) -> grain.IterDataset:
    """The endless rows of one virtual shard; every epoch has an order of its own.

    A long document fills many rows in a row.  They are shuffled with their neighbours' in windows,
    so that a batch is not a handful of documents, and neighbouring batches are not the same ones.

    Args:
      documents: random access to the examples by domain; each with a ``text`` in UTF-8.
      weights: share of the rows by domain, or of the documents; empty mixes all documents as they
        are.
      tokenizer: of the text.
      seq_len: tokens of one row.
      seed: of the order.
      shard: this shard, below ``num_shards``.
      num_shards: the documents are dealt out to so many shards.
      window: rows that are shuffled together; 1 leaves them in the order of the documents.
      by_examples: whether weights are shares of the documents; a row then has several domains.
      arrays: see :func:`pack`.
      moving: what changes while the stream is read; None: nothing does.
    """

    def endless(domains: Sequence[str], name: str) -> grain.MapDataset:
        sources = [grain.MapDataset.source(documents[domain]) for domain in domains]
        joined = grain.MapDataset.concatenate(sources)
        # Where there are fewer documents than shards, several shards read the same document.
        dealt = joined[shard % len(joined) :: num_shards]
        return dealt.shuffle(_seed(seed, shard, name)).repeat()

    def packed(examples: grain.MapDataset, name: str) -> grain.IterDataset:
        return shuffled(pack(examples, tokenizer, seq_len, arrays), name)

    def shuffled(rows: grain.IterDataset, name: str) -> grain.IterDataset:
        if window == 1:
            return rows
        return grain.experimental.WindowShuffleIterDataset(
            rows, window_size=window, seed=_seed(seed, shard, name, "window")
        )

    def moved(by_name: Mapping[str, grain.MapDataset], shares: Sequence[float]) -> MovingMixture:
        """The rows of several streams, or of one, while something changes."""
        rows = {}
        for name, examples in by_name.items():
            plain = functools.partial(_from, examples, functools.partial(packed, name=name))
            corrupted = None
            if moving.corrupt is not None:
                encode, key = functools.partial(_text_ids, tokenizer), _seed(seed, shard, name)
                corrupted = CorruptedRows(
                    examples, encode, moving.corrupt, tokenizer.bos_id, seq_len, key
                )
                corrupted = shuffled(corrupted, name)
            rows[name] = DomainRows(plain, corrupted)
        weights = {name: share / sum(shares) for name, share in zip(rows, shares, strict=True)}
        return MovingMixture(
            rows, weights, moving.corrupted_rows(shard, num_shards), shard, moving.refusal
        )

    if not weights:
        examples = endless(sorted(documents), "")
        return moved({"": examples}, [1]) if moving else packed(examples, "")
    domains = [domain for domain in sorted(documents) if weights[domain] > 0]
    by_domain = {domain: endless([domain], domain) for domain in domains}
    shares = [weights[domain] for domain in domains]
    if by_examples:
        mixed = grain.MapDataset.mix(list(by_domain.values()), shares)
        # Each shard begins the turns of the domains elsewhere.
        begin = int(sum(weights.values())) * shard // num_shards
        return moved({"": mixed[begin:]}, [1]) if moving else packed(mixed[begin:], "")
    if moving:
        return moved(by_domain, shares)
    # Each shard begins its round of the domains elsewhere, so that a batch of one row from each
    # shard is a mixture too.
    turn = shard % len(domains)
    domains = domains[turn:] + domains[:turn]
    streams = [packed(by_domain[domain], domain) for domain in domains]
    return grain.IterDataset.mix(streams, [weights[domain] for domain in domains])


def check_weights(weights: Mapping[str, float], domains: Sequence[str]) -> None:
    """Checks that the weights, if there are any, name every domain and no other.

    Raises:
      DataError: they don't.
    """
    missing = sorted(set(domains) - set(weights))
    unknown = sorted(set(weights) - set(domains))
    if weights and (missing or unknown):
        wrong = [f"lacks {', '.join(missing)}"] * bool(missing)
        wrong += [f"names {', '.join(unknown)}, which the data does not have"] * bool(unknown)
        raise DataError(
            f"config.data.domain_weights {' and '.join(wrong)}; "
            f"give a weight to each of {', '.join(sorted(domains))} (0 leaves one out)."
        )


def _from(
    documents: grain.MapDataset, rows: Callable[[grain.MapDataset], grain.IterDataset], first: int
) -> grain.IterDataset:
    """The rows of documents, beginning with one of them."""
    return rows(documents[first:])


def _text_ids(tokenizer: Tokenizer, example: Mapping) -> np.ndarray:
    """Ids of a document behind BOS, with EOS."""
    return _pairs(tokenizer, False, example)["targets"]


def _pairs(tokenizer: Tokenizer, with_responses: bool, example: Mapping) -> dict[str, np.ndarray]:
    text = example["text"].decode()
    try:
        inner = tokenizer.encode(text)
        kinds = (
            {responses.NAME: responses.kinds_of_targets(example, text, inner, tokenizer.encode)}
            if with_responses
            else {}
        )
    except DataError as error:
        raise DataError(f"{example['origin'].decode()}: {error}") from error
    ids = np.concatenate([[tokenizer.bos_id], inner, [tokenizer.eos_id]]).astype(np.int32)
    return {"tokens": ids[:-1], "targets": ids[1:], **kinds}


def _row(arrays: Collection[str], packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: packed[name] for name in arrays} | {
        "tokens": packed["tokens"],
        "targets": packed["targets"],
        "segment_ids": packed["tokens_segment_ids"],
        "positions": packed["tokens_positions"],
    }


def _seed(*parts) -> int:
    """32 bits; neighbouring seeds and shards have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())
