"""Greedy continuations of many prompts, of which what they begin with in common is read once.

The examples before the questions of a few-shot task are most of its prompts.  Here they are read
once for as many questions as fit into a row; :mod:`dynmoe_jax.inference` reads each prompt alone.

Axis legend: B rows, L tokens of a row, Q sequences of a row, M tokens that may be written, N MoE
layers.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Int

from dynmoe_jax.data import check_ids
from dynmoe_jax.evaluation.scoring.batches import Batch, lay_out, make_batches
from dynmoe_jax.evaluation.scoring.requests import Request
from dynmoe_jax.evaluation.scoring.tree_decoding import prefill_trees
from dynmoe_jax.inference.decoding import decode
from dynmoe_jax.inference.sampling import Draw
from dynmoe_jax.model import Decoder

ROUNDS = (16, 64, 256)
"""Tokens that may be written before the sequences that have not ended are packed anew: most answers
are short, and a row should not wait for the one that is not."""

CHUNK = 8
"""Tokens between two looks for strings that end a text."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
      tokens: at least one.
      limit: tokens to write at the most.
      ended: how many of the tokens written so far are there when a string has come that ends the
        text; None while none has.
    """

    tokens: tuple[int, ...]
    limit: int
    ended: Callable[[list[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Written:
    """Text that was written after a prompt.

    Attributes:
      ids: the tokens, the one that ended it not included.
      experts_N: experts used in each MoE layer, over the prompt and what was written but for its
        last token.
      experts_L: experts that each of these tokens used, summed over the MoE layers.
    """

    ids: list[int]
    experts_N: Int[np.ndarray, "N"]
    experts_L: Int[np.ndarray, "L"]


class TreeWriter:
    """Continues prompts with one model.

    Args:
      decoder: the model.
      batch_tokens: prompt tokens of one call.
      vocab_size: the tokenizer's; a model may have more rows, which mean nothing.
      eos_id: the token at which a text ends.
      end_ids: others at which it does.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch_tokens: int,
        vocab_size: int,
        eos_id: int,
        end_ids: Sequence[int] = (),
    ):
        self._structure, self._params = nnx.split(decoder)
        self._rows = decoder.config.vocab_size
        self._alone = decoder.keeps_router_cache
        self._batch_tokens = batch_tokens
        self._draw, self._end_ids = Draw.greedy(vocab_size), frozenset((eos_id, *end_ids))
        self.tokens_asked = 0
        """Of prompts, as if each one had been read alone."""
        self.tokens_read = 0
        """Of prompts; what several begin with in common counts once."""

    def write(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[int, Written]]]:
        """Yields (index of the prompt, its text), some at a time, in an order of its own.

        Raises:
          DataError: the model has no embedding of a token.
        """
        for prompt in prompts:
            check_ids(prompt.tokens, self._rows)
        so_far: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        for number in range(sum(prompt.limit for prompt in prompts)):
            if not so_far:
                return
            room = ROUNDS[min(number, len(ROUNDS) - 1)]
            left = {}
            for finished, unfinished in self._round(prompts, so_far, room):
                left |= unfinished
                yield finished
            so_far = left

    def _round(self, prompts, so_far: dict[int, list[int]], room: int):
        """Yields (texts that have ended, tokens of those that have not) of each batch."""
        numbers = list(so_far)
        # The token that follows is not known; the last one of a request is never read.
        requests = [Request((*prompts[i].tokens, *so_far[i], 0), 1) for i in numbers]
        for rows in make_batches(requests, self._batch_tokens, self._alone):
            for batch in lay_out(rows, requests, self._batch_tokens):
                owners = [numbers[index] for index, _, _ in batch.requests]
                yield self._write_batch(batch, owners, prompts, so_far, room)

    def _write_batch(self, batch: Batch, owners, prompts, so_far, room: int):
        slots, leaves_BQ, active_BQ = _sequences(batch)
        self.tokens_asked += sum(len(path) for _, path, _ in batch.requests)
        self.tokens_read += int(batch.segment_ids.sum())
        layout = (batch.tokens, batch.segment_ids, batch.positions, batch.ends)
        arguments = self._structure, self._params, *layout, leaves_BQ, active_BQ, self._draw
        state, experts_NT = prefill_trees(*arguments, room=room)
        ended: dict[int, int] = {}
        until = 1
        while True:
            tokens_BQM = np.asarray(state.tokens_SM).reshape(*active_BQ.shape, room)
            for n, (owner, slot) in enumerate(zip(owners, slots, strict=True)):
                if n not in ended:
                    ids = so_far[owner] + tokens_BQM[slot][:until].tolist()
                    end = self._end(ids, prompts[owner], len(so_far[owner]))
                    if end is not None:
                        ended[n] = end
            if len(ended) == len(owners) or until == room:
                break
            until = min(room, until + CHUNK)
            active_BQ = active_BQ.copy()
            for n in ended:
                active_BQ[slots[n]] = False
            state = dataclasses.replace(state, active_S=active_BQ.reshape(-1))
            state = decode(self._structure, self._params, None, state, self._draw, until)
        # Behind what predicted the first token, which is in the prompt, come the decoded ones.
        experts_BQMN = np.asarray(state.experts_SMN).reshape(*tokens_BQM.shape, -1)[:, :, 1:]
        experts = np.asarray(experts_NT), experts_BQMN
        return self._texts(batch, owners, slots, so_far, ended, tokens_BQM[:, :, :until], experts)

    def _texts(self, batch, owners, slots, so_far, ended, tokens_BQM, experts):
        """(texts that have ended, tokens of those that have not)."""
        experts_NT, experts_BQMN = experts
        finished, unfinished = [], {}
        for n, (_, path, _) in enumerate(batch.requests):
            owner, before = owners[n], so_far[owners[n]]
            ids = before + tokens_BQM[slots[n]].tolist()
            if n not in ended:
                unfinished[owner] = ids
                continue
            ids = ids[: ended[n]]
            read = max(0, len(ids) - len(before) - 1)
            experts_LN = np.concatenate(
                [experts_NT[:, path].T, experts_BQMN[slots[n]][:read]]
            ).astype(np.int32)
            written = Written(ids, experts_LN.sum(axis=0), experts_LN.sum(axis=1))
            finished.append((owner, written))
        return finished, unfinished

    def _end(self, ids: list[int], prompt: Prompt, start: int) -> int | None:
        """Returns the number of tokens of a text that has ended; None if it goes on."""
        ends = (start + n for n, token in enumerate(ids[start:]) if token in self._end_ids)
        end = next(ends, None)
        found = prompt.ended(ids[:end])
        if found is not None:
            return min(found, prompt.limit)
        if end is not None:
            return min(end, prompt.limit)
        return prompt.limit if len(ids) >= prompt.limit else None


def _sequences(batch: Batch):
    """(row and number of each request, their last tokens [B, Q], which of these there are)."""
    rows, length = batch.tokens.shape
    counts = [0] * rows
    slots, ends = [], []
    for _, path, _ in batch.requests:
        row, leaf = divmod(int(path[-1]), length)
        slots.append((row, counts[row]))
        ends.append(leaf)
        counts[row] += 1
    # A power of two, so that few programs are compiled.
    shape = rows, 1 << (max(counts) - 1).bit_length()
    leaves_BQ, active_BQ = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for slot, leaf in zip(slots, ends, strict=True):
        leaves_BQ[slot], active_BQ[slot] = leaf, True
    return slots, leaves_BQ, active_BQ
