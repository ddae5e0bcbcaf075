"""Files of others, broken at random: read as the libraries that define them do, or refused.

A refusal is one sentence, of an error that the commands turn into exit code 2; whatever else is
raised is a fault, and so is a value that is read differently.
"""

import json
import random
import runpy
import string
import sys
from collections import Counter

import gguf
import numpy as np
import pytest
import safetensors.numpy

from dynmoe_jax import config
from dynmoe_jax.data import DataError
from dynmoe_jax.interop import CheckpointError
from dynmoe_jax.interop.described import configured, describe
from dynmoe_jax.interop.files.source import open_source
from tests.interop.broken import (
    ENDS,
    GGUF_KEYS,
    GGUF_VALUES,
    KEYS,
    NAMES,
    VALUES,
    broken_bytes,
    broken_safetensors,
    replace,
)
from tests.interop.small_gguf import METADATA, write_gguf
from tests.interop.small_models import SETTINGS, settings_of, tensors_of, write_small

pytest.importorskip("transformers", reason="needs the extra test")

from transformers import GenerationConfig

from tests.interop import config_oracle

pytestmark = pytest.mark.slow

REFUSED = (CheckpointError, config.ConfigError, DataError)
LLAMA, INDEX = "LlamaForCausalLM", "model.safetensors.index.json"
CASES = {"config": 110, "index": 40, "tensors": 60, "generation": 40, "keys": 40, "bytes": 60}
outcomes = Counter()


def cases(kind, fuzz_cases):
    """A generator of random numbers for each case of a kind."""
    for number in range(fuzz_cases(CASES[kind], 10 * CASES[kind])):
        yield random.Random(f"{kind} {number}")


def outcome(kind, case, read):
    """Reads a case: what is read; None where it is refused in a sentence."""
    try:
        found = read()
    except REFUSED as error:
        sentence = str(error)
        assert sentence.isprintable(), (case, sentence)
        assert len(sentence) < 600, (case, sentence)
        assert sentence.endswith("."), (case, sentence)
        outcomes[kind, "refused"] += 1
        return None
    except Exception as error:
        raise AssertionError(f"{case} ends in a traceback") from error
    outcomes[kind, "read"] += 1
    return found


# Settings of config.json.

# transformers checks these, and the models here do not have them.
NOT_READ = ("use_cache", "layer_types", "sliding_window")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of each architecture."""
    place = tmp_path_factory.mktemp("small")
    return {name: write_small(place / name, name) for name in SETTINGS}


def is_lenient(reason):
    """Whether transformers refuses what has one meaning alone: 1 for 1.0, null for left out."""
    mild = ("expected float, got int", "got NoneType", *(f"field '{name}'" for name in NOT_READ))
    return any(part in reason for part in (*mild, "validate_layer_type", "is not iterable"))


def test_settings(folders, fuzz_cases):
    for draw in cases("config", fuzz_cases):
        name = draw.choice(list(SETTINGS))
        case, settings, folder = {}, settings_of(name), folders[name]
        for key in draw.choices(KEYS, k=draw.choice([1, 1, 2, 3])):
            case[key] = draw.choice(VALUES)
            settings[key] = case[key]
            if draw.random() < 0.15:
                del settings[key]
        (folder / "config.json").write_text(json.dumps(settings))
        case = (name, case, settings)
        found = outcome("config", case, lambda: configured(open_source(folder).settings, 99))  # noqa: B023
        if found is None:
            assert outcome("folder", case, lambda: describe(open_source(folder))) is None  # noqa: B023
            continue
        architecture, cfg = found
        if draw.random() < 0.3:  # what a model's tensors are takes 0.1 s
            whole = outcome("folder", case, lambda: describe(open_source(folder)))  # noqa: B023
            assert whole is None or whole.config == cfg
        if architecture.name in ("DeepseekForCausalLM", "MoEForCausalLM"):
            continue  # transformers lacks them
        wanted = config_oracle.theirs(folder, architecture.name)
        if isinstance(wanted, str):
            assert is_lenient(wanted), (case, wanted)
            continue
        ours = config_oracle.ours(cfg.model, architecture.name)
        assert config_oracle.differences(ours, wanted) == [], case


# The index of a sharded checkpoint.


def test_index(tmp_path, fuzz_cases):
    tensors, others = tensors_of(LLAMA), tensors_of(LLAMA, seed=2)
    folder = write_small(tmp_path / "hf", LLAMA)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "sub").mkdir()
    safetensors.numpy.save_file(others, folder / "b.safetensors")
    for draw in cases("index", fuzz_cases):
        names = {name: draw.choice(NAMES[:2]) for name in tensors}
        for name in draw.sample(list(names), draw.choice([0, 0, 1, 2])):
            names[name] = draw.choice(NAMES)
        if draw.random() < 0.1:
            del names[draw.choice(list(names))]
        if draw.random() < 0.1:
            names[draw.choice(["another", "", "a\nb", "\ud83d"])] = "a.safetensors"
        index = draw.choice([{"weight_map": names}] * 9 + [names, [names], {"weight_map": [names]}])
        text = json.dumps(index)
        (folder / INDEX).write_text(text if draw.random() < 0.9 else text[: draw.randrange(99)])
        found = outcome("index", index, lambda: load(folder))
        if found is not None:
            by_file = {"a.safetensors": tensors, "b.safetensors": others}
            assert found.keys() == names.keys() == tensors.keys()
            for name, file in names.items():
                np.testing.assert_array_equal(found[name], by_file[file][name])


def load(path):
    """Every tensor of a model that is described without a fault."""
    described = describe(open_source(path))
    return dict(described.source.tensors(described.found))


# The bytes of safetensors files.


def test_safetensors(tmp_path, fuzz_cases):
    folder = write_small(tmp_path / "hf", LLAMA)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for draw in cases("tensors", fuzz_cases):
        broken = broken_safetensors(draw, content)
        file.write_bytes(broken)
        found = outcome("tensors", broken[:3000], lambda: load(folder))
        if found is not None:
            wanted = safetensors.numpy.load_file(file)
            assert found.keys() <= wanted.keys()
            for name, tensor in found.items():
                np.testing.assert_array_equal(tensor, wanted[name])


# Tokens that end a text.


def test_generation_settings(tmp_path, fuzz_cases):
    folder = write_small(tmp_path / "hf", LLAMA)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    model = {"type": "BPE", "vocab": {"<e>": 0, "a": 1}, "merges": []}
    tokenizer = {"version": "1.0", "model": model, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = folder / "generation_config.json"
    for draw in cases("generation", fuzz_cases):
        settings = {"eos_token_id": draw.choice(ENDS), "pad_token_id": 3}
        if draw.random() < 0.2:
            del settings["eos_token_id"]
        text = json.dumps(settings).encode()
        file.write_bytes(broken_bytes(draw, text) if draw.random() < 0.2 else text)
        case = file.read_bytes()
        found = outcome("generation", case, lambda: open_source(folder).tokenizer().end_ids)
        if found is not None:
            wanted = GenerationConfig.from_pretrained(folder).eos_token_id
            wanted = wanted if isinstance(wanted, list) else [] if wanted is None else [wanted]
            assert set(found) == {0} | {token for token in wanted if token >= 0}, case


# Metadata and bytes of GGUF files.

OF_MODEL = {
    "llama.block_count": ("num_layers", None),
    "llama.context_length": ("max_seq_len", None),
    "llama.embedding_length": ("width", None),
    "llama.feed_forward_length": ("hidden_width", None),
    "llama.attention.head_count": ("num_heads", None),
    "llama.attention.head_count_kv": ("num_kv_heads", 3),
    "llama.attention.key_length": ("head_width", 4),
    "llama.attention.value_length": ("head_width", 4),
    "llama.rope.dimension_count": ("head_width", 4),
    "llama.rope.freq_base": ("rope_theta", 10000.0),
    "llama.attention.layer_norm_rms_epsilon": ("norm_epsilon", None),
}
"""Names of our settings, and what llama.cpp puts in where a key is missing."""


def test_gguf_metadata(tmp_path, fuzz_cases):
    for draw in cases("keys", fuzz_cases):
        changes = {key: draw.choice(GGUF_VALUES) for key in draw.choices(GGUF_KEYS, k=2)}
        if draw.random() < 0.3:
            changes[draw.choice(GGUF_KEYS)] = None
        path = write_gguf(tmp_path / "m.gguf", **changes)
        source = outcome("keys", changes, lambda: open_source(path))  # noqa: B023
        found = source and outcome("keys", changes, lambda: configured(source.settings, 99))  # noqa: B023
        if found is None:
            continue
        written = METADATA | changes
        for key, (ours, default) in OF_MODEL.items():
            value = written.get(key)
            wanted = default if value is None else np.float32(value)
            assert getattr(found[1].model, ours) == wanted, (changes, key)
        factor = written.get("llama.rope.scaling.factor", written.get("llama.rope.scale_linear"))
        kind = written.get("llama.rope.scaling.type") or "linear"
        assert kind == "none" or (kind == "linear" and factor in (None, 0, 1)), changes
        assert written.get("llama.expert_count") in (None, 0), changes
        assert written.get("llama.attention.causal") in (None, True), changes


def test_gguf_bytes(tmp_path, fuzz_cases):
    path = write_gguf(tmp_path / "m.gguf")
    content, plain = path.read_bytes(), load(path)
    header = int(gguf.GGUFReader(path).data_offset)
    for draw in cases("bytes", fuzz_cases):
        broken = broken_bytes(draw, content, 0, header)
        path.write_bytes(broken)
        found = outcome("bytes", broken[:2000], lambda: load(path))
        if found is None:
            continue
        wanted = {
            t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors
        }
        assert found.keys() == plain.keys()
        for i in (0, 1):
            tensor = found[f"model.layers.{i}.mlp.down_proj.weight"]
            np.testing.assert_array_equal(tensor, wanted[f"blk.{i}.ffn_down.weight"])


def test_enough_cases_were_read_and_enough_refused(fuzz_cases):
    """The tests above would pass on nothing but refusals."""
    read, refused = (sum(n for (_, what), n in outcomes.items() if what == word) for word in
                     ("read", "refused"))  # fmt: skip
    assert read + refused >= fuzz_cases(200, 2000)
    for kind in CASES:
        assert min(outcomes[kind, "read"], outcomes[kind, "refused"]) >= CASES[kind] / 20, outcomes


# What lies in a folder, by name.

CONFIG = json.dumps(settings_of(LLAMA))
CONTENTS = {
    "none": None,
    "empty": b"",
    "folder": "folder",
    "link": "link",
    "deep": b"[" * 100_000,
    "deeper": b'{"a":' * 100_000,
    "no text": b"\xff\xfe{}",
    "number": b"1" * 5000,
    "null": b"null",
    "zeros": bytes(9),
    "BOM": b"\xef\xbb\xbf" + CONFIG.encode(),
    "UTF-16": CONFIG.encode("utf-16"),
}
BROKEN = {
    f"{name}: {what}": replace(name, content)
    for name in ("config.json", "model.safetensors", INDEX)
    for what, content in CONTENTS.items()
}
READ = ("none", "link")


@pytest.mark.parametrize("what", BROKEN)
def test_folder(tmp_path, what):
    folder = write_small(tmp_path / "hf", LLAMA)
    BROKEN[what](folder)
    found = outcome("names", what, lambda: load(folder))
    assert (found is not None) == (what.startswith(INDEX) and what.endswith(READ))


@pytest.mark.parametrize(
    "name", ["with space", "数据", "a.gguf", "line\nbreak", *string.punctuation[-3:]]
)
def test_name_of_the_folder(tmp_path, name):
    assert load(write_small(tmp_path / name, LLAMA))


def test_commands_say_it_in_a_sentence(tmp_path, capsys, monkeypatch):
    folder = write_small(tmp_path / "hf", LLAMA)
    (folder / "config.json").write_text(json.dumps(settings_of(LLAMA, hidden_act="gelu\n")))
    arguments = ["import", "--from", str(folder), "--to", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["interop", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dynmoe_jax.interop", run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert said.startswith("error: config.json asks for hidden_act='gelu\\n'")
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
