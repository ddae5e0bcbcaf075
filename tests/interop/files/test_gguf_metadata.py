"""Metadata of a GGUF file are read as llama.cpp reads them, or refused."""

import struct

import gguf
import numpy as np
import pytest

from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.files.source import open_source
from tests.interop.small_gguf import METADATA, D, small_tensors, write_gguf


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)


# llama.cpp has defaults for these alone.
OPTIONAL = ("head_count_kv", "rope.freq_base", "rope.dimension_count")


@pytest.mark.parametrize("key", [key for key in METADATA if not key.endswith(OPTIONAL)])
def test_a_key_that_llama_cpp_requires_is_named(tmp_path, key):
    refused(write_gguf(tmp_path / "m.gguf", **{key: None}), f"m.gguf lacks {key}")


def test_what_llama_cpp_has_defaults_for(tmp_path):
    changes = {key: None for key in METADATA if key.endswith(OPTIONAL)}
    tensors = small_tensors()
    for i in (0, 1):
        for part in ("attn_k", "attn_v"):
            tensors[f"blk.{i}.{part}.weight"] = np.ones((D, D), np.float32)
    model = load_hf(write_gguf(tmp_path / "m.gguf", tensors, **changes)).config
    assert (model.num_kv_heads, model.head_width, model.rope_theta) == (3, 4, 10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.factor": 2.0}, "scaled rotary positions.*linear.*2.0"),
        ({"llama.rope.scale_linear": 4.0}, "scaled rotary positions.*linear.*4.0"),
        ({"llama.rope.scaling.type": "yarn"}, "scaled rotary positions.*yarn"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "llama.rope.scaling.attn_factor=1.5"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count=2.*4"),
        ({"llama.attention.key_length": 8}, "llama.attention.key_length=8.*value_length=4"),
        ({"llama.attention.value_length": 2}, "llama.attention.key_length=4.*value_length=2"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False"),
        ({"llama.attention.head_count": [3, 3]}, r"llama.attention.head_count=\[3, 3\]"),
        ({"llama.attention.head_count_kv": 0}, "llama.attention.head_count_kv=0"),
        ({"llama.embedding_length": "12"}, "llama.embedding_length='12'"),
        ({"llama.block_count": True}, "llama.block_count=True"),
        ({"llama.block_count": 2**40}, "tensors in all"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "layer_norm_rms_epsilon='x'"),
        ({"llama.rope.freq_base": [1.0]}, r"llama.rope.freq_base=\[1.0\]"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts"),
        ({"llama.expert_count": 4}, "with experts"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path, changes, message):
    refused(write_gguf(tmp_path / "m.gguf", **changes), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.factor": 0.0},
        {"llama.attention.key_length": 4, "llama.attention.value_length": 4},
        {"llama.expert_count": 0, "split.count": 1, "general.name": "line\nbreak"},
    ],
)
def test_what_changes_nothing_is_read(tmp_path, changes):
    plain = open_source(write_gguf(tmp_path / "plain.gguf")).settings
    found = open_source(write_gguf(tmp_path / "m.gguf", **changes))
    assert {**found.settings, "head_dim": None} == {**plain, "head_dim": None}
    load_hf(tmp_path / "m.gguf")


def test_tensors_of_the_other_byte_order_are_read_or_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", endian=gguf.GGUFEndian.BIG)
    refused(tmp_path / "m.gguf", "big-endian")


def test_a_file_is_known_by_what_it_holds(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    load_hf((tmp_path / "m.gguf").rename(tmp_path / "M.GGUF"))
    load_hf((tmp_path / "M.GGUF").rename(tmp_path / "blob"))
    (tmp_path / "blob").write_bytes(b"something else")
    refused(tmp_path / "blob", "blob is no folder and no GGUF file")


def test_without_an_embedding(tmp_path):
    tensors = small_tensors()
    del tensors["token_embd.weight"]
    refused(write_gguf(tmp_path / "m.gguf", tensors), r"lacks the tensor token_embd\.weight")
    tensors["token_embd.weight"] = np.array(1, np.float32)
    refused(write_gguf(tmp_path / "n.gguf", tensors), r"lacks the tensor token_embd\.weight")


def test_text_that_is_no_utf8(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    length = b"\x05\0\0\0\0\0\0\0"
    path.write_bytes(path.read_bytes().replace(length + b"llama", length + b"ll\xffma"))
    refused(path, "cannot be read as GGUF")


def field(path, name):
    """(bytes of a file, where the value of a metadata key begins)."""
    content = path.read_bytes()
    return content, content.index(name.encode()) + len(name) + 4


def test_an_array_that_is_longer_than_the_file(tmp_path):
    """Its elements are not looked for, one by one, behind the end."""
    path = write_gguf(tmp_path / "m.gguf")
    content, start = field(path, "tokenizer.ggml.token_type")
    lying = content[: start + 4] + struct.pack("<Q", 2**50) + content[start + 12 :]
    path.write_bytes(lying)
    refused(path, "cannot be read as GGUF")


def test_tensors_that_overlap_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path)
    offset = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").field
    place = offset.offset + sum(part.nbytes for part in offset.parts[:-1])
    content = bytearray(path.read_bytes())
    content[place : place + 8] = struct.pack("<Q", 0)
    path.write_bytes(content)
    refused(path, r"tensor blk\.1\.ffn_up\.weight")
