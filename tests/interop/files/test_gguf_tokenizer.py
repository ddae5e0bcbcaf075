"""The tokenizer of a GGUF file: ids are those of transformers, flags are as llama.cpp has them."""

import collections
import copy
import random

import pytest

from dynmoe_jax.command_line import exit_code
from dynmoe_jax.data import open_tokenizer
from dynmoe_jax.interop import CheckpointError
from dynmoe_jax.interop.__main__ import BAD_INPUT
from dynmoe_jax.interop.files.gguf_tokenizer import tokenizer_of
from dynmoe_jax.interop.files.source import open_source
from tests.data.tokenizers import tokenizer_folders as folders
from tests.interop.gguf_keys import metadata, vocabulary, write

# llama.cpp sets add_bos for the tokenizers that it counts to Llama-3's kind, and for no other
# byte-level one; the two keys override it (llama_vocab::impl::load).
FLAGS = [
    ("gpt-2", {}, (False, False)),
    ("qwen2", {}, (False, False)),
    ("smollm", {}, (False, False)),
    ("llama-bpe", {}, (True, False)),
    (None, {"add_bos_token": True}, (True, False)),
    ("gpt-2", {"add_bos_token": True}, (True, False)),
    ("gpt-2", {"add_bos_token": False}, (False, False)),
    ("llama-bpe", {"add_bos_token": False}, (False, False)),
    ("llama-bpe", {"add_bos_token": True}, (True, False)),
    ("gpt-2", {"add_eos_token": True}, (False, True)),
    ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ("llama-bpe", {"add_eos_token": False}, (True, False)),
]


def of_transformers(keys):
    """The tokenizer that transformers builds of the same keys; it needs no PyTorch for that."""
    mapping = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping", reason="needs the extra test"
    )
    names = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    named = {names.get(name, name): value for name, value in keys.items()}
    made = mapping.convert_gguf_tokenizer("llama", named)[0]
    # As AutoTokenizer does with the tokens that the file names.
    ends = [keys[f"{name}_token_id"] for name in ("bos", "eos") if f"{name}_token_id" in keys]
    made.add_special_tokens([keys["tokens"][number] for number in ends])
    return made


@pytest.mark.parametrize(("pre", "flags", "around"), FLAGS)
def test_bos_and_eos_stand_around_a_text_as_in_llama_cpp(pre, flags, around):
    tokenizer = tokenizer_of(metadata(vocabulary(pre, **flags)))
    assert (tokenizer.begins_with_bos, tokenizer.ends_with_eos) == around
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize("pre", [None, "gpt-2", "qwen2"])
def test_ids_and_texts_are_those_of_transformers(pre):
    keys = vocabulary(pre)
    ours, theirs = tokenizer_of(metadata(keys)), of_transformers(keys)
    assert ours.vocab_size == len(keys["tokens"])
    for text in folders.PROBES:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_llama_3s_kind_takes_a_token_as_it_is_and_others_merge(tmp_path):
    # In Llama-3's own tokenizer.json it is ignore_merges.
    tokens = [*vocabulary()["tokens"], "Ġspaces"]
    kinds = [*vocabulary()["token_type"], 1]
    found = {
        pre: tokenizer_of(metadata(vocabulary(pre, tokens=tokens, token_type=kinds)))
        for pre in ("gpt-2", "llama-bpe")
    }
    number = tokens.index("Ġspaces")
    main = folders.byte_level()
    model = {**main["model"]["vocab"], "Ġspaces": number}
    for pre, ignores in (("gpt-2", False), ("llama-bpe", True)):
        files = folders.changed(main, model_vocab=model, model_ignore_merges=ignores)
        folder = folders.write(tmp_path / pre, folders.folder_of(files, folders.FAST))
        ids = open_tokenizer(folder).encode(" spaces").tolist()
        assert (ids == [number]) == ignores
        assert found[pre].encode(" spaces").tolist() == ids


def test_a_file_is_read_as_transformers_reads_it(tmp_path):
    pytest.importorskip("torch", reason="needs the extra bench")
    transformers = pytest.importorskip("transformers", reason="needs the extra test")
    for flags in ({}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}):
        path = write(tmp_path / "model.gguf", vocabulary(**flags))
        ours = open_source(path).tokenizer()
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
        for text in folders.PROBES:
            before = [ours.bos_id] * ours.begins_with_bos
            after = [ours.eos_id] * ours.ends_with_eos
            assert [*before, *ours.encode(text).tolist(), *after] == theirs(text).input_ids


def test_a_token_of_text_that_is_named_unknown_or_padding_stays_text():
    keys = vocabulary(unknown_token_id=vocabulary()["tokens"].index("a"), padding_token_id=300)
    tokenizer = tokenizer_of(metadata(keys))
    assert tokenizer.decode(tokenizer.encode("a cat<|im_end|>")) == "a cat"
    assert b'"pad_token": "<|im_end|>"' in tokenizer.files["tokenizer_config.json"]


REFUSED = [
    ({"merges": None}, "no tokenizer.ggml.merges"),
    ({"tokens": None}, "no tokenizer.ggml.tokens"),
    ({"tokens": ["a", "b", "a"]}, "'a' twice"),
    ({"merges": ["ab"]}, "'ab', no two tokens"),
    ({"merges": ["Ġ zz"]}, "'Ġ zz', no two tokens"),
    ({"merges": [1, 2]}, "merges .* is no list of str"),
    ({"token_type": [1, 1]}, "302 tokens, but only 2 entries"),
    ({"eos_token_id": 302}, "eos_token_id .* is 302, but it has 302 tokens"),
    ({"eos_token_id": "</s>"}, "eos_token_id .* is '</s>', no int"),
    ({"eos_token_id": None}, "names no eos_token"),
    ({"add_bos_token": "true"}, "add_bos_token .* is 'true', no bool"),
    ({"add_bos_token": True, "bos_token_id": None}, "asks for BOS .* no tokenizer.ggml.bos_token_"),
    ({"model": "llama"}, "kind 'llama', 'gpt-2'; 'gpt2' with"),
    ({"pre": "tekken"}, "kind 'gpt2', 'tekken'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_keys_that_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_of(metadata(vocabulary(**change)))
    assert "\n" not in str(caught.value)


def test_no_merges_end_a_program_with_a_sentence(tmp_path, capsys):
    path = write(tmp_path / "model.gguf", vocabulary(merges=None))
    assert exit_code(lambda: open_source(path).tokenizer(), BAD_INPUT) == 2
    assert "has no tokenizer.ggml.merges" in " ".join(capsys.readouterr().out.split())


VALUES = (0, 1, 5, 300, 301, 302, -1, 2**32, True, False, None, "", "a", "gpt2", "qwen2", "[X]", [],
          ["a"], [1], [True, False], 0.5, ["a", "a"], "<s>", "a b", "Ġ t")  # fmt: skip


def changed_keys(seed):
    draw = random.Random(seed)
    keys = vocabulary(draw.choice(("gpt-2", "qwen2", None)))
    keys |= {name: draw.random() < 0.5 for name in ("add_bos_token",) if draw.random() < 0.5}
    for _ in range(draw.choice((1, 1, 2))):
        name = draw.choice((*sorted(keys), "add_bos_token", "add_eos_token", "unknown_token_id"))
        value = keys.get(name, True)
        if isinstance(value, list) and value and draw.random() < 0.8:
            value = copy.copy(value)
            one, other = draw.randrange(len(value)), draw.randrange(len(value))
            what = draw.choice(("swap", "swap", "set", "delete"))
            if what == "swap":
                value[one], value[other] = value[other], value[one]
            elif what == "set":
                value[one] = draw.choice(VALUES)
            else:
                del value[one]
            keys[name] = value
        else:
            alike = [other for other in VALUES if type(other) is type(value)]
            keys[name] = draw.choice(alike if draw.random() < 0.5 else VALUES)
    return {name: value for name, value in keys.items() if value is not None}


def test_changed_keys(fuzz_cases):
    outcomes, failures = collections.Counter(), []
    for seed in range(fuzz_cases(60, 600)):
        keys = changed_keys(seed)
        try:
            ours = tokenizer_of(metadata(keys))
        except CheckpointError as error:
            outcomes["refused"] += 1
            if "\n" in str(error) or not str(error).endswith("."):
                failures.append(f"seed {seed}: {error}")
            continue
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error}"[:300])
            continue
        if ours is None:
            continue
        outcomes["read"] += 1
        theirs = of_transformers(keys)
        around = (keys.get("add_bos_token", False), keys.get("add_eos_token", False))
        wanted = [theirs.encode(text, add_special_tokens=False).ids for text in folders.PROBES]
        found = [ours.encode(text).tolist() for text in folders.PROBES]
        if (ours.begins_with_bos, ours.ends_with_eos) != around or found != wanted:
            failures.append(f"seed {seed} is read otherwise than by transformers")
    assert not failures
    assert min(outcomes["read"], outcomes["refused"]) > outcomes.total() / 6
