"""Qwen2-MoE (arXiv 2407.10671), as ``Qwen2MoeForCausalLM`` of transformers.

Of the architectures in transformers it is the widest: weights renormalised or not, biases or none,
experts in any layers.  So it is also the format of top-k models as the Top-P paper trains them for
comparison; those have no shared expert, which in this format is one of no width.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.layouts import Folded, Shape
from dynmoe_jax.interop.architectures.llama import (
    DECODER_RULES,
    DEFAULTS,
    DENSE_RULES,
    EXPERT_RULES,
    LAYER,
    REQUIRED,
    decoder_settings,
    decoder_settings_to_hf,
)
from dynmoe_jax.interop.architectures.mapping import GATE, UP, Rule
from dynmoe_jax.interop.architectures.moe_layers import grouping, moe_layers
from dynmoe_jax.interop.quoted import shown
from dynmoe_jax.interop.settings import check_count, check_window, read_settings
from dynmoe_jax.runs.errors import CheckpointError

_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
}
_FIXED = {"model_type": "qwen2_moe", "hidden_act": "silu"}
_SHARED = LAYER + "mlp.shared_expert."
_SHARED_GATE = LAYER + "mlp.shared_expert_gate.weight"


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Raises:
      CheckpointError: a setting is missing, or asks for what our model does not compute.
    """
    required = (*REQUIRED, "intermediate_size", "moe_intermediate_size", "num_experts")
    hf = read_settings(settings, required=required, defaults=_DEFAULTS, fixed=_FIXED)
    shared = hf.get("shared_expert_intermediate_size")
    check_count("shared_expert_intermediate_size", shared, least=0)
    _check_windows(hf)
    layers, dense = hf["num_hidden_layers"], hf.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise CheckpointError(f"config.json has mlp_only_layers={shown(dense)}, no list of layers.")
    step = hf["decoder_sparse_step"]
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    return config.Model(
        **decoder_settings(hf, kv_heads=16),
        hidden_width=hf["intermediate_size"],
        attention_bias=hf["qkv_bias"],
        moe=config.MoE(
            router="top_k",
            num_experts=hf["num_experts"],
            hidden_width=hf["moe_intermediate_size"],
            top_k={"k": hf["num_experts_per_tok"], "renormalize": hf["norm_topk_prob"]},
            shared_hidden_width=shared,
            shared_gate=shared > 0,
            **grouping(sparse, layers),
        ),
    )


def _check_windows(hf: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a layer attends to fewer positions than the model reads."""
    kinds, asked = hf.get("layer_types"), hf["use_sliding_window"]
    windowed_layers = hf.get("max_window_layers", 28)
    check_count("max_window_layers", windowed_layers, least=0)
    if kinds is None:
        kinds = ["sliding_attention" if asked and windowed_layers else "full_attention"]
    elif not isinstance(kinds, list) or len(kinds) != hf["num_hidden_layers"]:
        raise CheckpointError(f"config.json has layer_types={shown(kinds)}, not one of each layer.")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"config.json has {shown(kind)} in layer_types; 'full_attention' can be read."
            )
    if "sliding_attention" in kinds:
        window = hf.get("sliding_window", 4096) if asked else 0
        check_window("sliding_window", window, hf["max_position_embeddings"])


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a top-k model, with a gated shared expert or with none."""
    sparse = moe_layers(model)
    return {
        **decoder_settings_to_hf(model),
        "model_type": "qwen2_moe",
        "intermediate_size": model.hidden_width,
        "moe_intermediate_size": model.moe.hidden_width,
        "shared_expert_intermediate_size": model.moe.shared_hidden_width,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k.k,
        "norm_topk_prob": model.moe.top_k.renormalize,
        "qkv_bias": model.attention_bias,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(model.num_layers) if i not in sparse],
        "use_sliding_window": False,
    }


def idle_tensors(model: config.Model) -> dict[str, Shape]:
    """The shared expert of no width, where a model has none."""
    if model.moe.shared_hidden_width:
        return {}
    shapes = {
        _SHARED + "gate_proj.weight": (0, model.width),
        _SHARED + "up_proj.weight": (0, model.width),
        _SHARED + "down_proj.weight": (model.width, 0),
        _SHARED_GATE: (1, model.width),
    }
    return {
        name.format(layer=layer): shape
        for layer in moe_layers(model)
        for name, shape in shapes.items()
    }


QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=(
        *DECODER_RULES,
        Rule(LAYER + "self_attn.q_proj.bias", "attention.query_bias_HW", Folded()),
        Rule(LAYER + "self_attn.k_proj.bias", "attention.key_bias_GW", Folded()),
        Rule(LAYER + "self_attn.v_proj.bias", "attention.value_bias_GW", Folded()),
        *DENSE_RULES,
        *EXPERT_RULES,
        Rule(_SHARED + "gate_proj.weight", "feed_forward.shared_gate_up_D2F", half=GATE),
        Rule(_SHARED + "up_proj.weight", "feed_forward.shared_gate_up_D2F", half=UP),
        Rule(_SHARED + "down_proj.weight", "feed_forward.shared_down_FD"),
        Rule(_SHARED_GATE, "feed_forward.shared_router_D1"),
    ),
    idle_tensors=idle_tensors,
)
