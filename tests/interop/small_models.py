"""Small models in Hugging Face's format: every architecture with random tensors, in a moment."""

import functools
import json

import numpy as np
from safetensors.numpy import save_file

from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.architectures.registry import ARCHITECTURES
from dynmoe_jax.model import parameter_shapes

# Widths all different, so that no mix-up goes unseen.
SHAPE = {
    "vocab_size": 20,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "intermediate_size": 10,
}
SETTINGS = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MixtralForCausalLM": {"model_type": "mixtral", "num_local_experts": 4},
    "OlmoeForCausalLM": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 6,
        "num_experts": 4,
        "shared_expert_intermediate_size": 8,
    },
    "DeepseekForCausalLM": {
        "model_type": "deepseek",
        "moe_intermediate_size": 6,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "MoEForCausalLM": {"model_type": "dynamic_moe", "num_experts": 4, "expert_frequency": 2},
}


def settings_of(name, **changes):
    """``config.json`` of a small model."""
    return {"architectures": [name], **SHAPE, **SETTINGS[name], **changes}


@functools.cache
def _shapes(name, changes):
    model = ARCHITECTURES[name].model_from_hf(settings_of(name, **json.loads(changes)))
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    found = parameter_slices(ARCHITECTURES[name].rules, model, shapes)
    return {n: ours.layout.foreign_shape(ours.shape(shapes)) for n, ours in found.items()}


def tensors_of(name, seed=1, **changes):
    """Random tensors of a small model, by name."""
    random = np.random.default_rng(seed)
    shapes = _shapes(name, json.dumps(changes))
    return {n: random.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def write(folder, settings, tensors):
    """A folder with ``config.json`` and ``model.safetensors``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_small(folder, name, seed=1, **changes):
    """A folder with a whole small model."""
    return write(folder, settings_of(name, **changes), tensors_of(name, seed, **changes))
