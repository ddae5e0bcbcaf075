"""An exported SentencePiece model, read by transformers: the same ids, the same text."""

import io
import random

import pytest
import sentencepiece

from dynmoe_jax.data import open_tokenizer, train_tokenizer
from dynmoe_jax.data.tokenizers.hf import HfTokenizer
from dynmoe_jax.interop.files.tokenizer_files import PROBES, hf_files, write_tokenizer

TEXT = "a token of some tokens, and   more of them\n\tdef f(x): return 12 == x ** 2\n" * 30
LETTERS = "abdefnort  \n\t▁éz012<>/s=*数🙂\r\0-."


def trained(path, **settings):
    """A SentencePiece model with settings of other projects."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=300,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return train_tokenizer([TEXT], 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """As Llama's: a space is put before every text."""
    path = tmp_path_factory.mktemp("tokenizer") / "llama.model"
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return trained(path, model_type="bpe", byte_fallback=True, **identity)


@pytest.fixture(params=["ours", "llama"])
def exported(request, tmp_path):
    """(tokenizer, folder that it was exported to)"""
    tokenizer = request.getfixturevalue(request.param)
    write_tokenizer(tokenizer, tmp_path)
    return tokenizer, tmp_path


def odd_texts():
    draw = random.Random(0)
    return ["".join(draw.choices(LETTERS, k=draw.randint(1, 60))) for _ in range(400)]


def test_ids_and_texts_are_the_same(exported):
    tokenizer, folder = exported
    converted = HfTokenizer.load(folder)
    assert converted.vocab_size == tokenizer.vocab_size
    assert (converted.bos_id, converted.eos_id, converted.begins_with_bos) == (1, 2, True)
    assert converted.token_bytes_V.tolist() == tokenizer.token_bytes_V.tolist()
    for text in (*PROBES, *odd_texts()):
        ids = tokenizer.encode(text).tolist()
        assert converted.encode(text).tolist() == ids, repr(text)
        assert converted.decode(ids) == tokenizer.decode(ids), repr(text)


def test_transformers_reads_it(exported):
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    tokenizer, folder = exported
    read = transformers.AutoTokenizer.from_pretrained(folder)
    assert (read.bos_token_id, read.eos_token_id) == (1, 2)
    for text in PROBES:
        ids = tokenizer.encode(text).tolist()
        assert read(text).input_ids == [1, *ids]
        assert read.decode([1, *ids, 2], skip_special_tokens=True) == tokenizer.decode(ids)


def test_one_that_has_no_equal_is_written_as_it_is(tmp_path, capsys):
    unigram = trained(tmp_path / "unigram.model", model_type="unigram", hard_vocab_limit=False)
    folder = tmp_path / "hf"
    folder.mkdir()
    write_tokenizer(unigram, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert "has no equal in Hugging Face's format" in " ".join(capsys.readouterr().out.split())
    again = open_tokenizer(folder)
    assert again.begins_with_bos
    assert (again.bos_id, again.eos_id) == (unigram.bos_id, unigram.eos_id)
    assert again.encode(TEXT[:40]).tolist() == unigram.encode(TEXT[:40]).tolist()


def test_what_a_text_spells_out_is_no_byte_and_no_end(ours, tmp_path):
    ours.save(tmp_path / "tokenizer.model")
    converted = HfTokenizer(hf_files(tmp_path / "tokenizer.model"))
    ids = converted.encode("<0x41></s>")
    assert converted.decode(ids) == "<0x41></s>"
    assert converted.eos_id not in ids
