"""Keys ``tokenizer.ggml.*`` of a small byte-level vocabulary, and files that hold them."""

import gguf
import numpy as np

from tests.data.tokenizers.tokenizer_folders import byte_level

PREFIX = "tokenizer.ggml."
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4


def vocabulary(pre: str | None = "gpt-2", **changes) -> dict:
    """Keys without their prefix; one that is changed to None is left out."""
    model = byte_level()["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|im_end|>", "[X]"]
    kinds = {"<s>": CONTROL, "</s>": CONTROL, "<|im_end|>": CONTROL, "[X]": USER_DEFINED}
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds.get(token, NORMAL) for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return {name: value for name, value in keys.items() if value is not None}


def metadata(keys: dict):
    """What reads a key, as of an opened file."""
    return {PREFIX + name: value for name, value in keys.items()}.get


def write(path, keys: dict):
    """A GGUF file of a Llama of one layer, without its weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    for name, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(PREFIX + name, value)
        elif isinstance(value, int):
            writer.add_uint32(PREFIX + name, value)
        elif isinstance(value, str):
            writer.add_string(PREFIX + name, value)
        else:
            writer.add_array(PREFIX + name, value)
    writer.add_tensor("token_embd.weight", np.zeros((len(keys["tokens"]), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
