import random
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dynmoe_jax.data import DataError, open_tokenizer, train_tokenizer
from dynmoe_jax.data.tokenizers.sentencepiece import _TRAINING_BYTES, _stretches

TEXTS = st.one_of(
    st.text(),
    st.text(alphabet=" \t\n\r▁<>/sunk0xA", max_size=40),
    st.lists(st.sampled_from(["def f():\n", "    ", "\t", "\n\n\n", "  x = 1  ", "é", "\0"])).map(
        "".join
    ),
)


@settings(deadline=None)
@given(TEXTS)
@example("<s></s><unk><0x41>")
@example("▁▁ ▁")
def test_every_text_comes_back_exactly_and_the_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


def test_bytes_and_control_tokens_are_counted_right(tokenizer):
    assert tokenizer.token_bytes_V.shape == (384,)
    assert tokenizer.token_bytes_V[[0, tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0, 0]
    assert tokenizer.token_bytes_V[3:259].tolist() == [1] * 256


def test_training_twice_gives_the_same_tokenizer(prepared, tokenizer, tmp_path):
    again = train_tokenizer(prepared.sample_texts(1.0), 384, tmp_path / "again.model")
    assert again.fingerprint == tokenizer.fingerprint


def test_what_is_written_is_what_was_returned(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy.model")
    loaded = open_tokenizer(tmp_path / "copy.model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (384, 1, 2)


def test_pieces_may_hold_several_words_and_line_ends(tmp_path):
    texts = [f"if this is so:\n    return the value {i}\n" for i in range(50)]
    tokenizer = train_tokenizer(texts, 340, tmp_path / "t.model")
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(texts[0])]
    assert any(" " in piece.strip() for piece in pieces)
    assert any("\n" in piece and piece.strip() for piece in pieces)


def test_a_vocabulary_too_large_for_the_text_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"config.model.vocab_size=5000 is more than the \d+ tok"):
        train_tokenizer(["a few words. " * 9], 5000, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_too_small_for_bytes_names_the_setting(tmp_path):
    with pytest.raises(DataError, match=r"config.model.vocab_size=200"):
        train_tokenizer(["a few words. " * 9], 200, tmp_path / "t.model")


LONG_LINES = st.lists(
    st.tuples(
        st.sampled_from(
            ["router ", "é", "😀", "\n", "\r\n", "▅", "▁", " ", "x\n", "\n\ny", "a" * 999]
        ),
        st.integers(1, 900),
    ),
    max_size=6,
).map(lambda parts: "".join(part * times for part, times in parts))


@settings(deadline=None, max_examples=60)
@given(LONG_LINES)
@example("é" * 5000 + "\n" + "short\n" * 900 + "😀" * 1001)
@example("\n" + "😀" * 1000)
@example("a" + "\n" * 3999 + "😀" * 1000 + "b\n▅\nc")
def test_trainer_sees_every_character_of_long_lines(text):
    """But for the two that mean something else to it, and line ends where a text ends in some."""
    stretches = list(_stretches([text, "end"]))
    assert max(len(stretch.encode()) for stretch in stretches) <= 2 * _TRAINING_BYTES
    assert not [stretch for stretch in stretches if stretch != stretch.rstrip("\r\n")]
    seen, whole = "".join(stretches), re.sub("[▁▅]", "", text)
    if not re.search(r"[▁▅]|[\r\n]{2000}", text):
        lost = whole.removeprefix(seen.removesuffix("end"))
        assert not lost.strip("\r\n")
    assert seen.replace("\n", "").replace("\r", "") == re.sub(r"[\r\n]", "", whole) + "end"


@pytest.fixture(scope="module")
def words():
    """Distinct words: 240 kB."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(30_000)]


def test_text_without_line_ends_gives_as_large_a_vocabulary(words, tmp_path):
    """Four documents of 60 kB, of which 4,000 characters were seen."""
    quarters = [" ".join(words[i::4]) for i in range(4)]
    cut, whole = (tmp_path / "cut.model", tmp_path / "whole.model")
    in_lines = [re.sub(r"(.{1,70}) ", r"\1\n", text) for text in quarters]
    ours = train_tokenizer(quarters, 4096, cut)
    theirs = train_tokenizer(in_lines, 4096, whole)
    assert len(ours.encode(quarters[3])) < 1.05 * len(theirs.encode(in_lines[3]))


@pytest.mark.parametrize("reserved", ["▅", "▁"])
def test_character_with_a_meaning_to_the_trainer_costs_no_text_around_it(reserved, tmp_path):
    """SentencePiece leaves out all of what it is given at once, where that holds U+2585."""
    text = "the router passes mass to its experts; "
    plain = train_tokenizer([text * 100], 340, tmp_path / "plain.model")
    texts = [(text * 10 + f"▂{reserved}▇ ") * 10]
    tokenizer = train_tokenizer(texts, 340, tmp_path / "t.model")
    assert len(tokenizer.encode(text)) <= len(plain.encode(text)) + 1
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_line_ends_at_the_border_of_stretches_are_seen(tmp_path):
    """SentencePiece strips them from the end of all that it is given at once."""
    line = "x" * (_TRAINING_BYTES - 10) + "\n\n\n\n"
    assert "".join(_stretches([line * 3 + "end"])) == line * 3 + "end"


def test_text_of_nothing_to_learn_from_is_refused_with_that(tmp_path):
    for texts in ([], ["\n\n", "▅"]):
        with pytest.raises(DataError, match=r"no text to train a tokenizer on; name other"):
            train_tokenizer(texts, 300, tmp_path / "t.model")


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x00" * 1000])
def test_what_is_no_model_is_refused_by_name(tmp_path, content):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"config.data.tokenizer=.*t.model"):
        open_tokenizer(path)


def train_plain(path, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on, again and again"] * 20),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return path


def test_a_model_without_bos_is_refused(tmp_path):
    path = train_plain(tmp_path / "t.model", vocab_size=40, bos_id=-1)
    with pytest.raises(DataError, match="no BOS"):
        open_tokenizer(path)


def test_a_model_with_llamas_properties_works_unchanged(tmp_path):
    options = {"byte_fallback": True, "add_dummy_prefix": True, "remove_extra_whitespaces": False}
    normal = {"normalization_rule_name": "identity", "vocab_size": 310}
    tokenizer = open_tokenizer(train_plain(tmp_path / "t.model", **options, **normal))
    text = "some  words\n\tagain é▁"
    ids = tokenizer.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    # One for the space that is put before; "▁" reads as a space, one byte for three.
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode()) + 1 - 2
