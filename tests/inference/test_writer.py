"""Texts: pieces, stop strings, streams, limits; and how they are shown."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from dynmoe_jax.config import ConfigError
from dynmoe_jax.inference.effort import Scale, coloured, numbered
from dynmoe_jax.inference.pieces import Pieces, end_of_text, pieces_up_to, undecided
from dynmoe_jax.inference.records import as_record
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer, Written

GREEDY = Sampling(max_tokens=9, temperature=0.0)


@pytest.fixture
def writer(decoder, letters, generator):
    def make(sampling=GREEDY, stops=(), **rest):
        made = Writer(decoder, letters, sampling, stops, copy_layers=False, **rest)
        made.generator = generator  # its programs are compiled already
        return made

    return make


def test_bos_stands_before_a_prompt_as_the_tokenizer_says(decoder, letters, writer):
    assert writer().encode("fb").tolist() == [0, 7, 3]
    assert writer(begin_with_bos=False).encode("fb").tolist() == [7, 3]
    assert writer(begin_with_bos=False).encode("").tolist() == [0]  # something must be read


def test_a_character_of_two_tokens_comes_with_the_second(letters):
    pieces = Pieces(letters, [0, 2])
    pieces.add([3, 31])
    assert (pieces.pieces, pieces.text) == (["b", ""], "b\N{REPLACEMENT CHARACTER}")
    pieces.add([32, 30])
    assert (pieces.pieces, pieces.text) == (["b", "", "é", "stop"], "béstop")


def test_the_first_stop_string_ends_a_text():
    assert end_of_text("one two three", ["three", "two"]) == 4
    assert end_of_text("one", ["two"]) is None


def test_what_may_become_a_stop_string_is_held_back():
    assert undecided("one tw", ["two", "wide"]) == 2
    assert undecided("one", ["two"]) == 0


def test_pieces_are_cut_where_the_text_is():
    assert pieces_up_to(["ab", "", "cde", "f"], 3) == ["ab", "", "c"]
    assert pieces_up_to(["ab", "c"], 0) == []


def test_text_ends_before_a_stop_string_that_crosses_tokens(writer):
    whole = writer().write(["fb"])[0][0]
    assert len(whole.text) == 9
    stop = whole.text[3:5]
    ended = writer(stops=[stop]).write(["fb"])[0][0]
    end = whole.text.index(stop)
    assert (ended.text, ended.ended) == (whole.text[:end], True)
    assert "".join(ended.pieces) == ended.text
    assert ended.ids.tolist() == whole.ids[: len(ended.pieces)].tolist()
    assert len(ended.experts_nN) == len(ended.ids)


def test_what_is_streamed_joins_to_the_text(writer):
    told = []
    written = writer().write(["fb"], on_text=told.append)[0][0]
    assert "".join(told) == written.text
    assert len([text for text in told if text]) > 1
    told.clear()
    stop = written.text[4:6]
    ended = writer(stops=[stop]).write(["fb"], on_text=told.append)[0][0]
    assert "".join(told) == ended.text


def test_samples_stand_with_their_prompt(writer):
    sampling = dataclasses.replace(GREEDY, temperature=1.5)
    texts = writer(sampling).write(["fb", "a"], samples=2)
    assert [[written.prompt for written in samples] for samples in texts] == [["fb"] * 2, ["a"] * 2]
    assert texts[0][0].text != texts[0][1].text


def test_a_text_that_does_not_fit_the_model_is_refused(writer):
    with pytest.raises(ConfigError, match=r"--max_tokens=40 and a prompt of 11 tokens .* to 37"):
        writer(Sampling(max_tokens=40)).write(["abcdefghij"])
    with pytest.raises(ConfigError, match="a prompt of 51 tokens leaves no room in the 48"):
        writer().write(["a" * 50])
    assert writer(Sampling(temperature=0.0))._limit(np.zeros(11)) == 37


def made(pieces=("ab", "c\n", "d"), experts=((1, 1), (1, 2), (4, 3))):
    experts_nN = np.array(experts, np.int32).reshape(len(pieces), -1)
    return Written(
        "in", 3, "".join(pieces), np.arange(3), list(pieces), experts_nN, True, np.zeros((3, 0))
    )


def test_colours_go_from_the_fewest_experts_to_the_most():
    scale = Scale.of([made()])
    assert (scale.low, scale.high) == (1.0, 3.5)
    assert scale.edges() == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert [scale.step(count) for count in made().experts_n] == [0, 1, 4]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    console.print(coloured(made(), scale))
    assert "48;2;184;66;28" in console.file.getvalue()  # the background of the hardest token


def test_without_colours_numbers_stand_below_the_tokens():
    assert numbered(made(), 40) == ["in", "", "ab  c⏎", "1.0 1.5", "d", "3.5"]
    assert numbered(made(), 5) == ["in", "", "ab", "1.0", "c⏎", "1.5", "d", "3.5"]


def test_a_dense_model_has_no_effort_to_show():
    dense = made(experts=((), (), ()))
    assert Scale.of([dense]) is None
    assert as_record([dense])["samples"][0]["experts"] == []


def test_records_hold_tokens_and_experts_by_layer():
    record = as_record([made()])
    assert (record["prompt"], record["prompt_tokens"]) == ("in", 3)
    sample = record["samples"][0]
    assert sample["finish_reason"] == "stop"
    assert sample["experts"].tolist() == [[1, 1], [1, 2], [4, 3]]
    assert sample["pieces"] == ["ab", "c\n", "d"]


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
