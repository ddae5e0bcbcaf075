"""Tokens that end a text: read as transformers and llama.cpp do, kept in a run, written back."""

import json
import sys

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models

from dynmoe_jax.data import DataError, open_tokenizer
from dynmoe_jax.inference import __main__ as inference
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.interop.files.source import open_source
from dynmoe_jax.interop.import_model import import_model
from dynmoe_jax.runs.load import load_run
from tests.interop.small_gguf import LETTERS, write_gguf
from tests.interop.small_models import settings_of, tensors_of, write

LLAMA = "LlamaForCausalLM"


def write_hf_tokenizer(folder):
    words = ["<s>", "</s>", "<|im_end|>", "<|eot|>", "a", "b", "ab"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(word, special=True) for word in words[:4]])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def write_sentencepiece(folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba abba"] * 9), model_prefix=str(folder / "tokenizer"),
        model_type="bpe", vocab_size=9, bos_id=0, eos_id=1, unk_id=8, hard_vocab_limit=False,
        user_defined_symbols=["<|im_end|>", "<|eot|>"], minloglevel=2,
    )  # fmt: skip


@pytest.fixture(params=[write_hf_tokenizer, write_sentencepiece])
def folder(request, tmp_path):
    """A Llama with a tokenizer whose EOS is token 1."""
    folder = write(tmp_path / "hf", settings_of(LLAMA), tensors_of(LLAMA))
    request.param(folder)
    return folder


def change(folder, settings=None, generation=None):
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings_of(LLAMA) | settings))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def theirs(folder):
    """EOS as transformers finds it for ``generate``."""
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    read = transformers.GenerationConfig.from_pretrained
    if (folder / "generation_config.json").exists():
        found = read(folder).eos_token_id
    else:
        found = read(folder, config_file_name="config.json", _from_model_config=True).eos_token_id
    found = [] if found is None else found if isinstance(found, list) else [found]
    return {token for token in found if token >= 0}


CASES = [
    (None, {"eos_token_id": [2, 3]}),
    (None, {"eos_token_id": 3}),
    (None, {"eos_token_id": [3, 1, 3]}),
    ({"eos_token_id": [2, 3]}, None),
    ({"eos_token_id": 2}, None),
    ({"eos_token_id": 2}, {"eos_token_id": [3]}),
    ({"eos_token_id": 2}, {"eos_token_id": None}),
    ({"eos_token_id": 2}, {"temperature": 0.5}),
    ({"eos_token_id": None}, None),
    (None, {"eos_token_id": []}),
    (None, {"eos_token_id": [-1, 2]}),
    (None, {"eos_token_id": 5000}),
    (None, {}),
]


@pytest.mark.parametrize(("settings", "generation"), CASES)
def test_ends_are_those_of_transformers_and_eos(folder, settings, generation):
    change(folder, settings, generation)
    assert set(open_source(folder).tokenizer().end_ids) == theirs(folder) | {1}


def test_an_imported_run_keeps_them_and_so_does_what_begins_with_it(folder, tmp_path):
    change(folder, {"eos_token_id": 1}, {"eos_token_id": [2, 3], "top_k": 5})
    import_model(folder, tmp_path / "run")
    tokenizer = load_run(tmp_path / "run")[2]
    assert sorted(tokenizer.end_ids) == [1, 2, 3]
    open_tokenizer(tmp_path / "run" / tokenizer.name_in_run).save(
        tmp_path / "tuned" / tokenizer.name_in_run
    )
    assert sorted(open_tokenizer(tmp_path / "tuned" / tokenizer.name_in_run).end_ids) == [1, 2, 3]


@pytest.mark.parametrize(
    ("settings", "generation"),
    [(None, {"eos_token_id": [2, 3], "top_k": 5}), ({"eos_token_id": [2, 3]}, None)],
)
def test_an_export_writes_them_back(folder, tmp_path, settings, generation):
    change(folder, settings, generation)
    import_model(folder, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "back")
    assert theirs(tmp_path / "back") == {2, 3}
    written = json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"]
    assert sorted(written) == [1, 2, 3]
    if generation is not None:
        found = json.loads((tmp_path / "back" / "generation_config.json").read_text())
        assert found == generation
    (tmp_path / "again").mkdir()
    import_model(tmp_path / "back", tmp_path / "again" / "run")
    assert sorted(load_run(tmp_path / "again" / "run")[2].end_ids) == [1, 2, 3]


@pytest.mark.parametrize("value", ["</s>", [[2]], [2.0], True, {"id": 2}, 2**40, ["2"]])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_what_is_no_token_is_refused(folder, place, value):
    found = {"eos_token_id": value}
    change(folder, *((found, None) if place == "config.json" else (None, found)))
    with pytest.raises(DataError, match=f"{place} has eos_token_id=") as caught:
        open_source(folder).tokenizer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(folder, content):
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"generation_config\.json") as caught:
        open_source(folder).tokenizer()
    assert "\n" not in str(caught.value)


TOKENS = ["<|begin|>", "<|stop|>", *LETTERS]


@pytest.mark.parametrize(
    ("last", "changes", "wanted"),
    [
        (["<|x|>", "<|y|>"], {}, {1}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.eot_token_id": 39}, {1, 39}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.eom_token_id": 38}, {1, 38}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.fim_pad_token_id": 38}, {1, 38}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.fim_rep_token_id": 38}, {1, 38}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.fim_sep_token_id": 38}, {1, 38}),
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.fim_pre_token_id": 38}, {1}),
        # llama.cpp knows them by their texts, too.
        (["<|im_end|>", "<|endoftext|>"], {}, {1, 38, 39}),
        (["<|eot_id|>", "<|eom_id|>"], {}, {1, 38, 39}),
        (["<|repo_name|>", "<|file_sep|>"], {}, {1, 38, 39}),
        (["<|fim_pad|>", "<|im_start|>"], {}, {1, 38}),
        # A number out of the vocabulary counts for nothing.
        (["<|x|>", "<|y|>"], {"tokenizer.ggml.eot_token_id": 40}, {1}),
    ],
)
def test_ends_of_a_gguf_file_are_those_of_llama_cpp(tmp_path, last, changes, wanted):
    changes |= {"tokenizer.ggml.tokens": [*TOKENS, *last]}
    path = write_gguf(tmp_path / "m.gguf", **changes)
    tokenizer = open_source(path).tokenizer()
    assert set(tokenizer.end_ids) == wanted
    tokenizer.save(tmp_path / "run" / tokenizer.name_in_run)
    assert set(open_tokenizer(tmp_path / "run" / tokenizer.name_in_run).end_ids) == wanted


def test_end_of_harmony_is_no_end(tmp_path):
    """Where a text may be made of several messages, each closed by a token of that name."""
    tokens = [*TOKENS[:-4], "<|end|>", "<|return|>", "<|call|>", "ab", "<|x|>", "<|y|>"]
    path = write_gguf(tmp_path / "m.gguf", **{"tokenizer.ggml.tokens": tokens})
    assert set(open_source(path).tokenizer().end_ids) == {1, 35, 36}
    tokens[35:37] = ["8", "9"]
    path = write_gguf(tmp_path / "n.gguf", **{"tokenizer.ggml.tokens": tokens})
    assert set(open_source(path).tokenizer().end_ids) == {1, 34}


def constant(token):
    """Tensors of a Llama that writes one token for ever."""
    tensors = {name: np.zeros_like(values) for name, values in tensors_of(LLAMA).items()}
    tensors["model.embed_tokens.weight"] += 1
    tensors["model.norm.weight"] += 1
    tensors["lm_head.weight"][token] += 1
    return tensors


@pytest.mark.parametrize(
    ("token", "generation", "more"),
    [(6, {"eos_token_id": [1, 6]}, []), (2, {"eos_token_id": 1}, ["--stop=<|im_end|>"])],
)
def test_the_command_ends_a_text_there(tmp_path, monkeypatch, token, generation, more):
    folder = write(tmp_path / "hf", settings_of(LLAMA), constant(token))
    write_hf_tokenizer(folder)
    change(folder, generation=generation)
    import_model(folder, tmp_path / "run")
    command = ["inference", f"--workdir={tmp_path / 'run'}", "--prompt=a", "--temperature=0"]
    command += ["--max_tokens=5", f"--json={tmp_path / 'out.json'}", *more]
    monkeypatch.setattr(sys, "argv", command)
    assert inference.main() == 0
    [[sample]] = [record["samples"] for record in json.loads((tmp_path / "out.json").read_text())]
    assert (sample["finish_reason"], sample["tokens"]) == ("stop", [])
