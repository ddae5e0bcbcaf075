"""Ways to break files of others: values that nobody expects, bytes changed and lost."""

import json
import struct

from tests.interop.small_gguf import METADATA

# Settings of config.json.

KEYS = [
    "architectures", "model_type", "vocab_size", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
    "intermediate_size", "hidden_act", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "attention_bias",
    "mlp_bias", "clip_qkv", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob",
    "moe_intermediate_size", "qkv_bias", "shared_expert_intermediate_size", "decoder_sparse_step",
    "mlp_only_layers", "quantization_config", "per_layer_config", "use_cache", "n_routed_experts",
    "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "scoring_func",
    "expert_frequency", "top_p_threshold", "another_key",
]  # fmt: skip
VALUES = [
    *(0, 1, 2, 3, 4, 8, 12, 16, 32, 64, -1, 2**31, 2**40, 10**400),
    *(1.0, 0.5, 1e-5, 1e6, float("nan"), float("inf"), -0.0, True, False, None),
    *("", "silu", "swish", "gelu", "12", "llama", "mixtral", "x" * 999, "a\nb", "\ud83d", "\0"),
    *([], [0], [1], [0, 1], [[]], [None], ["full_attention"] * 2, ["sliding_attention"] * 2),
    *(["LlamaForCausalLM"], [["LlamaForCausalLM"]], {}, {"": None}, {"rope_type": "default"}),
    *({"rope_type": "default", "rope_theta": 500.0}, {"type": "linear", "factor": 2.0}),
    *({"rope_type": "llama3", "factor": 8.0}, {"rope_theta": "x"}, {"rope_theta": None}),
    {"full_attention": {"rope_type": "default", "rope_theta": 7.0}},
    *({"quant_method": "fp8"}, {"0": {"head_dim": 8}}, {"__float__": "Infinity"}),
]

# Files that an index may name.

NAMES = ["a.safetensors", "b.safetensors", "gone.safetensors", "x/../a.safetensors", "../a", "/a"]
NAMES += ["", ".", "a" * 999, "a\nb", "\0", "\ud83d", 5, None, [], {"a": 1}, "config.json", "sub"]

# Tokens that generation_config.json may name.

ENDS = [0, 1, 5, 7, 300, -1, 2**31, 10**400, 2.0, True, None, "1", [], [5, 7], [5, [7]], [None]]
ENDS += [[-1, 5], ["5"], {"a": 1}, {}, [5, 5], [5, 2.0], "\ud83d", float("nan")]

# Metadata of GGUF files.

GGUF_KEYS = [*METADATA, "llama.attention.key_length", "llama.attention.value_length"]
GGUF_KEYS += ["llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear"]
GGUF_KEYS += ["llama.expert_count", "llama.attention.causal", "split.count", "general.name"]
GGUF_VALUES = [0, 1, 2, 3, 4, 12, 20, 32, 2**31, 2**40, -1, 0.0, 1.0, 2.5, 1e-5, float("nan")]
GGUF_VALUES += [True, False, "none", "linear", "yarn", "12", "a\nb", [3, 3], ["a"], [1.0]]


def broken_header(draw, header):
    """The header with something in it changed."""
    name = draw.choice(list(header))
    entry = header[name]
    kind = draw.randrange(9)
    if kind == 0:
        entry["dtype"] = draw.choice(["F16", "BF16", "F64", "I32", "F8_E4M3", "BOOL", "X", None, 3])
    elif kind == 1:
        entry["shape"] = draw.choice([[], [0], [-1], [2**62, 4], entry["shape"][::-1], "x", None])
    elif kind == 2:
        start, end = entry["data_offsets"]
        entry["data_offsets"] = draw.choice([[end, start], [start, end + 4], [0, 0], [-1, 1], None])
    elif kind == 3:
        header[draw.choice(["", "another", "a\nb", "__metadata__", "\ud83d"])] = header.pop(name)
    elif kind == 4:
        header["__metadata__"] = draw.choice([{"format": "tf"}, {"format": 1}, [], None])
    elif kind == 5:
        del entry[draw.choice(list(entry))]
    elif kind == 6:
        other = draw.choice(list(header))
        header[name], header[other] = header[other], header[name]
    return json.dumps(header)


def broken_bytes(draw, content, start=0, end=None):
    """A file with some of its bytes changed, lost, or more than there were."""
    place = draw.randrange(start, end or len(content))
    kind = draw.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return (
            content[:place]
            + bytes(draw.choices(range(256), k=draw.choice([1, 8])))
            + content[place:]
        )
    changed = bytearray(content)
    for _ in range(draw.choice([1, 2, 8])):
        changed[draw.randrange(start, end or len(content))] = draw.choice([0, 1, 127, 255, 34, 44])
    return bytes(changed)


def broken_safetensors(draw, content):
    (length,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.3:
        return broken_bytes(draw, content, 0, 8 + length)
    text = broken_header(draw, json.loads(content[8 : 8 + length]))
    if draw.random() < 0.2:  # a name twice
        text = text[:-1] + ", " + text[1:]
    encoded = text.encode()
    size = draw.choice([len(encoded)] * 12 + [0, 2**63, len(encoded) - 1])
    return struct.pack("<Q", size) + encoded + content[8 + length :]


def replace(name, content):
    """Puts something else under a name: bytes, a folder, or a link to nowhere."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        if content is None:
            return
        if content == "folder":
            (folder / name).mkdir()
        elif content == "link":
            (folder / name).symlink_to(folder / "nowhere")
        else:
            (folder / name).write_bytes(content)

    return change
