"""Log-probabilities of continuations, and the experts used on the way, in few passes.

Contexts that several requests share are computed once, tokens that differ are packed together
(:mod:`.batches`), and the logits of the vocabulary exist only for tokens whose successor is asked
for, a chunk of them at a time.

Axis legend: B rows, L tokens of a row, T = B L tokens, C scored tokens of one chunk, P pairs of a
scored token and one that may follow it, D model width, V vocabulary, N MoE layers.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax.data import check_ids
from dynmoe_jax.evaluation.scoring.batches import Batch, lay_out, make_batches
from dynmoe_jax.evaluation.scoring.requests import Answer, Request
from dynmoe_jax.evaluation.scoring.tree_attention import attend_in_trees
from dynmoe_jax.model import Decoder

CHUNK = 256
"""Scored tokens whose logits exist at one time (docs/measurements.md: eval-logits)."""


class Scorer:
    """Answers requests with one model.

    Args:
      decoder: the model.
      batch_tokens: tokens of one call.
      max_length: tokens that the model may read at once; a longer request loses its beginning.
    """

    def __init__(self, decoder: Decoder, batch_tokens: int, max_length: int):
        self._structure, self._params = nnx.split(decoder)
        self._rows = decoder.config.vocab_size
        self._alone = decoder.keeps_router_cache
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.tokens_asked = 0
        """Tokens of the requests, as if each one had been read alone."""
        self.tokens_read = 0
        """Tokens that the model was given, padding not counted."""

    def answer(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """Yields (index of the request, its answer), a batch at a time, in an order of its own.

        Raises:
          DataError: the model has no embedding of a token.
        """
        for request in requests:
            check_ids(request.tokens, self._rows)
        requests = [self._cut(request) for request in requests]
        pending = None
        for rows in make_batches(requests, self.batch_tokens, self._alone):
            for batch in lay_out(rows, requests, self.batch_tokens):
                # The next batch is on its way before this one is read.
                running = batch, self._run(batch)
                if pending:
                    yield self._read(requests, *pending)
                pending = running
        if pending:
            yield self._read(requests, *pending)

    def _cut(self, request: Request) -> Request:
        """The request without what the model cannot read at once."""
        tokens = request.tokens[-(self.max_length + 1) :]
        return Request(tokens, min(request.scored, len(tokens) - 1), request.counted)

    def _run(self, batch: Batch):
        self.tokens_read += int(batch.segment_ids.sum())
        return _score(
            self._structure,
            self._params,
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            batch.ends,
            batch.nodes,
            batch.num_nodes,
            batch.slots,
            batch.targets,
        )

    def _read(self, requests, batch: Batch, results) -> list[tuple[int, Answer]]:
        log_prob_P, greedy_P, experts_NT = map(np.asarray, results)
        answers = []
        for index, path, pairs in batch.requests:
            self.tokens_asked += len(path)
            counted = requests[index].counted
            counted = path if counted is None else path[len(path) - counted :]
            experts_NL = experts_NT[:, counted].astype(np.int32)
            answer = Answer(
                # In double precision: a long text has thousands of terms.
                log_prob=float(log_prob_P[pairs].astype(np.float64).sum()),
                greedy=bool(greedy_P[pairs].all()),
                experts_N=experts_NL.sum(axis=1),
                experts_L=experts_NL.sum(axis=0),
            )
            answers.append((index, answer))
        return answers


@partial(jax.jit, static_argnums=0)
def _score(
    structure,
    params,
    tokens_BL,
    segment_ids_BL,
    positions_BL,
    ends_BL,
    nodes_T,
    num_nodes,
    slots_P,
    targets_P,
):
    """(log p and whether it was the likeliest, of each pair; experts of each token by layer)."""
    decoder = nnx.merge(structure, params)
    attend_in_trees(decoder, ends_BL)
    x_BLD, routing = decoder.hidden(tokens_BL, segment_ids_BL, positions_BL)
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    log_prob_P, greedy_P = _pairs(decoder, x_TD, nodes_T, num_nodes, slots_P, targets_P)
    experts_NT = jnp.zeros((0, x_TD.shape[0]), jnp.int16)
    if routing is not None:
        experts_NT = routing.by_layer.experts_per_token_T.astype(jnp.int16)
    return log_prob_P, greedy_P, experts_NT


def _pairs(
    decoder: Decoder,
    x_TD: Float[Array, "T D"],
    nodes_T: Int[Array, "T"],
    num_nodes: Int[Array, ""],
    slots_P: Int[Array, "P"],
    targets_P: Int[Array, "P"],
):
    """log p of each pair's target after its scored token, and whether none is likelier."""
    chunk = math.gcd(CHUNK, nodes_T.size)

    def score_chunk(i, carry):
        log_prob_P, greedy_P = carry
        node_C = jax.lax.dynamic_slice(nodes_T, (i * chunk,), (chunk,))
        logits_CV = decoder.logits(x_TD[node_C][None])[0]
        log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
        best_C = jnp.argmax(logits_CV, axis=-1)
        here_P = slots_P // chunk == i
        row_P = jnp.where(here_P, slots_P % chunk, 0)
        target_P = logits_CV[row_P, targets_P] - log_z_C[row_P]
        greedy_P = jnp.where(here_P, best_C[row_P] == targets_P, greedy_P)
        return jnp.where(here_P, target_P, log_prob_P), greedy_P

    start = jnp.zeros(slots_P.shape, jnp.float32), jnp.zeros(slots_P.shape, bool)
    return jax.lax.fori_loop(0, -(-num_nodes // chunk), score_chunk, start)
