"""Scores behind a shared context against full passes."""

import jax
import numpy as np
from flax import nnx

from dynmoe_jax.inference.scoring import read_contexts, repeat_contexts, score

CONTEXTS = [[0, 7, 3, 5], [0, 9]]
ENDINGS = [[[4, 2], [8, 6, 1]], [[7], [3, 3, 2]]]


def test_scores_are_those_of_full_passes(decoder):
    structure, params = nnx.split(decoder)
    tokens_BP, start_B = np.zeros((2, 6), np.int32), np.zeros(2, np.int32)
    for row, context in enumerate(CONTEXTS):
        start_B[row] = 6 - len(context)
        tokens_BP[row, start_B[row] :] = context
    contexts = read_contexts(structure, params, tokens_BP, start_B)
    endings = [ending for of_context in ENDINGS for ending in of_context]
    length_B = np.array([len(ending) for ending in endings])
    tokens_BC = np.array([ending + [0] * (3 - len(ending)) for ending in endings], np.int32)
    scores = score(structure, params, repeat_contexts(contexts, 2), tokens_BC, length_B)
    again = score(structure, params, contexts, tokens_BC[::2], length_B[::2])
    np.testing.assert_allclose(again.log_prob_BC, scores.log_prob_BC[::2], rtol=1e-5, atol=1e-5)

    whole = jax.jit(lambda params, tokens_1L: nnx.merge(structure, params)(tokens_1L))
    for row, ending in enumerate(endings):
        context, end = CONTEXTS[row // 2], len(ending)
        # Tokens behind the end change nothing, and one size compiles once.
        tokens_1L = np.array([(context + ending + [5] * 7)[:7]], np.int32)
        output = whole(params, tokens_1L)
        log_probs_LV = jax.nn.log_softmax(output.logits[0, len(context) - 1 :])[:end]
        wanted_C = np.take_along_axis(np.asarray(log_probs_LV), np.array(ending)[:, None], 1)[:, 0]
        np.testing.assert_allclose(scores.log_prob_BC[row, :end], wanted_C, rtol=1e-5, atol=1e-5)
        assert not np.any(scores.log_prob_BC[row, end:])
        greedy_C = np.argmax(log_probs_LV, axis=1) == np.array(ending)
        np.testing.assert_array_equal(scores.greedy_BC[row, :end], greedy_C)
        wanted_NC = output.routing.experts_per_token[:, 0, len(context) : len(context) + end]
        np.testing.assert_array_equal(scores.experts_NBC[:, row, :end], wanted_NC)
        assert not np.any(scores.experts_NBC[:, row, end:])
