"""Tokenizers in Hugging Face's format, made here."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from dynmoe_jax.data import DataError, find_tokenizer, open_tokenizer, remove_tokenizer


def write(folder, settings=None):
    """A byte-level tokenizer with two control tokens, and one that stands for text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat and the other cat"] * 9, trainer)
    made.add_tokens([AddedToken("[X]", special=False, normalized=False)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    default = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    settings = default if settings is None else settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize("text", ["", "the cat", " é\n\t▁ 漢字 \0", "a [X] b", "<s>x</s>"])
def test_every_text_comes_back_and_the_bytes_add_up(tmp_path, text):
    tokenizer = open_tokenizer(write(tmp_path))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    plain = text.replace("<s>", "").replace("</s>", "")
    assert tokenizer.decode(ids) == plain
    assert tokenizer.token_bytes_V[ids].sum() == len(plain.encode())


def test_ends_of_documents(tmp_path):
    tokenizer = open_tokenizer(write(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.token_bytes_V[:2].tolist() == [0, 0]
    without_bos = open_tokenizer(write(tmp_path, {"eos_token": "</s>"}))
    assert (without_bos.bos_id, without_bos.eos_id) == (1, 1)
    assert tokenizer.fingerprint != without_bos.fingerprint


def test_what_is_written_is_what_was_read(tmp_path):
    tokenizer = open_tokenizer(write(tmp_path / "a"))
    tokenizer.save(tmp_path / "run" / tokenizer.name_in_run)
    found = find_tokenizer(tmp_path / "run")
    assert open_tokenizer(found).fingerprint == tokenizer.fingerprint
    assert (found / "chat_template.jinja").read_text() == "{{ messages }}"
    remove_tokenizer(tmp_path / "run")
    assert find_tokenizer(tmp_path / "run") is None


def test_folders_that_are_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        open_tokenizer(tmp_path)
    write(tmp_path, {"bos_token": "<s>"})
    with pytest.raises(DataError, match="names no eos_token"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json.*cannot be read") as caught:
        open_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
