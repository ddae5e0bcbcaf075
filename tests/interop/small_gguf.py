"""Small GGUF files of llama.cpp's architecture ``llama``, with any metadata."""

import string

import gguf
import numpy as np

D, F, H, G, W, V, N = 12, 20, 3, 1, 4, 40, 2
LAYER = {
    "attn_norm": (D,),
    "attn_q": (H * W, D),
    "attn_k": (G * W, D),
    "attn_v": (G * W, D),
    "attn_output": (D, H * W),
    "ffn_norm": (D,),
    "ffn_gate": (F, D),
    "ffn_up": (F, D),
    "ffn_down": (D, F),
}
METADATA = {
    "llama.block_count": N,
    "llama.context_length": 32,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": H,
    "llama.attention.head_count_kv": G,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": W,
}
LETTERS = [*string.ascii_lowercase, *"012345678", "ab"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<|begin|>", "<|stop|>", *LETTERS, "<|x|>", "<|y|>"],
    "tokenizer.ggml.token_type": [3, 3, *[1] * len(LETTERS), 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def small_tensors():
    """Random tensors by their names in GGUF."""
    random = np.random.default_rng(2)
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
    shapes |= {f"blk.{i}.{n}.weight": shape for i in range(N) for n, shape in LAYER.items()}
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write_gguf(path, tensors=None, architecture="llama", endian=gguf.GGUFEndian.LITTLE, **changes):
    """A file; ``changes`` are metadata by name, None to leave one out."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endian)
    for name, value in (METADATA | TOKENIZER | changes).items():
        add(writer, name, value)
    for name, tensor in (small_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, tensor.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, name, value):
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_int64(name, value) if not 0 <= value < 2**32 else writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str | bytes):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)
