"""Tokenizers of foreign models' folders: what lies beside a SentencePiece model is read too."""

import pytest
from safetensors.numpy import save_file

from dynmoe_jax.command_line import exit_code
from dynmoe_jax.data import kept_tokenizer
from dynmoe_jax.interop.__main__ import BAD_INPUT
from dynmoe_jax.interop.files.source import open_source
from tests.data.tokenizers.as_transformers import differences, read_by_transformers
from tests.data.tokenizers.tokenizer_folders import (
    LLAMA,
    byte_level,
    folder_of,
    sentencepiece_model,
    write,
)

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def write_model(folder, files):
    """A folder of a model without any weight."""
    write(folder, files | {"config.json": {"model_type": "llama"}})
    save_file({}, folder / "model.safetensors")
    return folder


def test_added_tokens_beside_a_sentencepiece_model(tmp_path):
    pytest.importorskip("transformers", minversion="5.24", reason="needs the extra test")
    files = {
        "tokenizer.model": sentencepiece_model(**IDENTITY),
        "added_tokens.json": {"<|im_end|>": 300, "<|im_start|>": 301},
        "tokenizer_config.json": LLAMA | {"eos_token": "<|im_end|>", "add_bos_token": True},
    }
    folder = write_model(tmp_path / "hf", files)
    tokenizer = open_source(folder).tokenizer()
    assert not differences(tokenizer, read_by_transformers(folder))
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.begins_with_bos) == (300, 302, True)
    assert tokenizer.encode("<|im_start|>")[0] == 301
    assert tokenizer.decode([300, *tokenizer.encode("the cat"), 300]) == "the cat"
    tokenizer.save(tmp_path / "run" / tokenizer.name_in_run)
    assert kept_tokenizer(tmp_path / "run").eos_id == 300


def test_a_folder_without_one_has_none(tmp_path):
    assert open_source(write_model(tmp_path, {})).tokenizer() is None


def test_a_bad_one_ends_a_program_with_a_sentence(tmp_path, capsys):
    files = folder_of(byte_level(), LLAMA | {"tokenizer_class": "BertTokenizer"})
    folder = write_model(tmp_path, files)
    assert exit_code(lambda: open_source(folder).tokenizer(), BAD_INPUT) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "PreTrainedTokenizerFast there has tokenizer.json read as it stands." in said
