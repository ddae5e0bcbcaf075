"""Rows of long documents are spread by shuffling in windows, without losing or repeating any."""

import json

import numpy as np

from dynmoe_jax.data.packing import shard_rows
from dynmoe_jax.data.shards import RowsInTurn

WINDOW = 16


class Numbers:
    """A stand-in for a tokenizer: one token per character."""

    bos_id, eos_id = 1, 2

    def encode(self, text):
        return np.array([ord(c) for c in text], np.int32)


# Three documents of 32 rows each.
DOCUMENTS = {"x": [{"text": (letter * 255).encode()} for letter in "abc"]}


def rows(window):
    return shard_rows(DOCUMENTS, {}, Numbers(), 8, 0, 0, 1, window)


def first_tokens(iterator, count):
    return [next(iterator)["tokens"].tolist() for _ in range(count)]


def test_a_window_holds_the_same_rows_in_another_order():
    plain, shuffled = (first_tokens(iter(rows(w)), 6 * WINDOW) for w in (1, WINDOW))
    assert plain != shuffled
    for start in range(0, 6 * WINDOW, WINDOW):
        window = slice(start, start + WINDOW)
        assert sorted(plain[window]) == sorted(shuffled[window])


def test_a_stream_stopped_inside_a_window_goes_on_with_its_rest():
    iterator = iter(RowsInTurn({0: rows(WINDOW)}, 1))
    first_tokens(iterator, WINDOW + 5)
    state = json.loads(json.dumps(iterator.get_state()))
    wanted = first_tokens(iterator, 3 * WINDOW)
    resumed = iter(RowsInTurn({0: rows(WINDOW)}, 1))
    resumed.set_state(state)
    assert first_tokens(resumed, 3 * WINDOW) == wanted
