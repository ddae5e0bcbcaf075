"""Strings that end a text, special tokens among them, and tokens that do."""

import pytest

from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer

GREEDY = Sampling(max_tokens=9, temperature=0.0)


class Special:
    """The tokenizer of letters, of which some are special tokens: decoding leaves them out."""

    def __init__(self, letters, special_tokens=None, end_ids=(1,)):
        self._letters, self.special_tokens = letters, special_tokens or {}
        self.end_ids = end_ids

    def __getattr__(self, name):
        return getattr(self._letters, name)

    def decode(self, ids):
        return self._letters.decode([token for token in ids if token not in self.special_tokens])


@pytest.fixture
def write(decoder, letters, generator):
    """(stops, tokenizer's changes) -> (what was written, pieces that were streamed)."""

    def written(*stops, **changes):
        writer = Writer(decoder, Special(letters, **changes), GREEDY, stops, copy_layers=False)
        writer.generator = generator  # its programs are compiled already
        told = []
        [[found]] = writer.write(["fb"], on_text=told.append)
        assert "".join(told) == found.text
        return found

    return written


@pytest.fixture
def ids(write):
    """Tokens of the text that nothing ends; the sixth is there once."""
    ids = write().ids.tolist()
    assert len(ids) == 9
    assert ids.count(ids[5]) == 1
    return ids


def test_any_of_the_tokenizers_ends_ends_a_text(write, ids):
    found = write(end_ids=(1, ids[5]))
    assert (found.ids.tolist(), found.ended) == (ids[:5], True)
    assert not write(end_ids=(1, 39)).ended


def test_a_special_token_is_found_although_it_gives_no_text(write, ids, letters):
    special = {ids[5]: "<|im_end|>", 0: "<|im_start|>"}
    assert not write(special_tokens=special).ended
    found = write("<|im_end|>", special_tokens=special)
    assert (found.ids.tolist(), found.ended) == (ids[:5], True)
    assert found.text == "".join(found.pieces) == letters.decode(ids[:5])
    assert not write("<|im_start|>", special_tokens=special).ended


def test_a_stop_string_may_hold_a_special_token_and_text(write, ids, letters):
    special = {ids[5]: "<|im_end|>"}
    after = letters.decode(ids[6:8])
    found = write(f"<|im_end|>{after}", special_tokens=special)
    assert (found.ids.tolist(), found.ended) == (ids[:5], True)
    before = letters.decode(ids[4:5])
    found = write(f"{before}<|im_end|>{after}", special_tokens=special)
    assert (found.text, found.ended) == (letters.decode(ids[:4]), True)
    assert not write(f"<|im_end|>{after}?", special_tokens=special).ended


def test_a_part_of_a_special_tokens_name_is_no_text(write, ids):
    assert not write("im_end", special_tokens={ids[5]: "<|im_end|>"}).ended


def test_the_first_of_a_token_and_a_string_ends(write, ids, letters):
    special = {ids[5]: "<|im_end|>"}
    early, late = letters.decode(ids[2:4]), letters.decode(ids[6:8])
    assert write(early, "<|im_end|>", special_tokens=special).ids.tolist() == ids[:2]
    assert write(late, "<|im_end|>", special_tokens=special).ids.tolist() == ids[:5]
