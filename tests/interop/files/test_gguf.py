"""GGUF files, written with the package ``gguf`` in llama.cpp's order."""

import gguf
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.architectures.llama import LLAMA
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.files.source import open_source
from tests.interop.foreign_tensors import to_tensors

D, F, H, G, W, V, N = 64, 96, 4, 2, 16, 40, 2
NAMES = {
    "attn_norm": ("input_layernorm", (D,)),
    "attn_q": ("self_attn.q_proj", (H * W, D)),
    "attn_k": ("self_attn.k_proj", (G * W, D)),
    "attn_v": ("self_attn.v_proj", (G * W, D)),
    "attn_output": ("self_attn.o_proj", (D, H * W)),
    "ffn_norm": ("post_attention_layernorm", (D,)),
    "ffn_gate": ("mlp.gate_proj", (F, D)),
    "ffn_up": ("mlp.up_proj", (F, D)),
    "ffn_down": ("mlp.down_proj", (D, F)),
}


@pytest.fixture(scope="module")
def tensors():
    """Random tensors by their names in GGUF."""
    random = np.random.default_rng(2)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    shapes |= {f"blk.{i}.{n}.weight": shape for i in range(N) for n, (_, shape) in NAMES.items()}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write(path, tensors, quantise=None, architecture="llama", **metadata):
    """A GGUF file; ``quantise`` is what matrices are stored as."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(N)
    writer.add_context_length(32)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    for name, value in metadata.items():
        writer.add_string(name.replace("__", "."), value)
    for name, tensor in tensors.items():
        kind = quantise if tensor.ndim == 2 else None
        stored = tensor if kind is None else gguf.quantize(tensor, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def back(decoder):
    """The decoder's parameters under Hugging Face's names."""
    ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.state(decoder).flat_state()}
    shapes = {path: values.shape for path, values in ours.items()}
    return to_tensors(parameter_slices(LLAMA.rules, decoder.config, shapes), ours)


def test_settings(tmp_path, tensors):
    model = load_hf(write(tmp_path / "m.gguf", tensors)).config
    assert (model.num_layers, model.width, model.hidden_width, model.vocab_size) == (N, D, F, V)
    assert (model.num_heads, model.num_kv_heads, model.head_width) == (H, G, W)
    assert (model.max_seq_len, model.rope_theta) == (32, 5000.0)
    assert model.norm_epsilon == np.float32(1e-5)
    assert not model.tie_embeddings
    assert model.moe.every_n_layers == 0


def test_tensors(tmp_path, tensors):
    found = back(load_hf(write(tmp_path / "m.gguf", tensors)))
    for name in ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm"):
        hf = f"model.layers.1.{NAMES[name][0]}.weight"
        np.testing.assert_array_equal(found[hf], tensors[f"blk.1.{name}.weight"])
    np.testing.assert_array_equal(found["lm_head.weight"], tensors["output.weight"])


@pytest.mark.parametrize(("name", "heads"), [("attn_q", H), ("attn_k", G)])
def test_rows_of_queries_and_keys_are_parted_into_halves(tmp_path, tensors, name, heads):
    found = back(load_hf(write(tmp_path / "m.gguf", tensors)))
    ours = found[f"model.layers.1.{NAMES[name][0]}.weight"].reshape(heads, W, D)
    stored = tensors[f"blk.1.{name}.weight"].reshape(heads, W, D)
    # Component i is turned together with i + W/2 here, and lies beside it in llama.cpp.
    np.testing.assert_array_equal(ours[:, : W // 2], stored[:, ::2])
    np.testing.assert_array_equal(ours[:, W // 2 :], stored[:, 1::2])


def test_without_output_the_embedding_is_tied(tmp_path, tensors):
    tied = {name: tensor for name, tensor in tensors.items() if name != "output.weight"}
    assert load_hf(write(tmp_path / "m.gguf", tied)).config.tie_embeddings


def test_quantised(tmp_path, tensors):
    kind = gguf.GGMLQuantizationType.Q8_0
    found = back(load_hf(write(tmp_path / "m.gguf", tensors, kind)))
    wanted = tensors["blk.0.ffn_down.weight"]
    actual = found["model.layers.0.mlp.down_proj.weight"]
    # Blocks of 32 numbers share a scale, a 127th of the largest, in float16.
    largest = np.abs(wanted.reshape(-1, 32)).max(axis=1)
    error = np.abs(actual - wanted).reshape(-1, 32).max(axis=1)
    assert np.all(error <= largest / 127 * (0.5 + 127 / 2**11))
    assert np.any(error > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'.*dense ones of 'llama'"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tensors, change, message):
    with pytest.raises(CheckpointError, match=message):
        load_hf(write(tmp_path / "m.gguf", tensors, **change))


def test_unknown_and_missing_tensors(tmp_path, tensors):
    more = tensors | {"blk.0.attn_q.bias": np.zeros(H * W, np.float32)}
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q\.bias has"):
        load_hf(write(tmp_path / "more.gguf", more))
    less = {name: tensor for name, tensor in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight is miss"):
        load_hf(write(tmp_path / "less.gguf", less))


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"m\.gguf does not exist"):
        open_source(tmp_path / "m.gguf")
    for content in (b"", b"not this format at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read as GGUF") as caught:
            open_source(tmp_path / "m.gguf")
        assert "\n" not in str(caught.value)
