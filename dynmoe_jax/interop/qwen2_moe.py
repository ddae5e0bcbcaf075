"""Qwen2-MoE (arXiv 2407.10671), as ``Qwen2MoeForCausalLM`` of transformers.

Of the architectures in transformers it is the widest: weights renormalised or not, biases or none,
experts in any layers.  So it is also the format of top-k models as the Top-P paper trains them for
comparison; those have no shared expert, which in this format is one of no width.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architecture import Architecture
from dynmoe_jax.interop.errors import CheckpointError
from dynmoe_jax.interop.layouts import Folded, Shape
from dynmoe_jax.interop.llama import (
    DECODER_RULES,
    DEFAULTS,
    DENSE_RULES,
    EXPERT_RULES,
    LAYER,
    REQUIRED,
    decoder_settings,
    decoder_settings_to_hf,
    without_head_width,
)
from dynmoe_jax.interop.mapping import GATE, UP, Rule
from dynmoe_jax.interop.moe_layers import grouping, moe_layers
from dynmoe_jax.interop.settings import read_settings

_DEFAULTS = DEFAULTS | {
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
}
_FIXED = {"hidden_act": "silu", "use_sliding_window": False}
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
    if type(shared) is not int or shared < 0:
        raise CheckpointError(f"config.json has shared_expert_intermediate_size={shared!r}.")
    layers, dense = hf["num_hidden_layers"], hf.get("mlp_only_layers") or []
    step = hf["decoder_sparse_step"]
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    return config.Model(
        **decoder_settings(without_head_width(hf)),
        hidden_width=hf["intermediate_size"],
        attention_bias=hf["qkv_bias"],
        moe=config.MoE(
            router="top_k",
            num_experts=hf["num_experts"],
            hidden_width=hf["moe_intermediate_size"],
            top_k=hf["num_experts_per_tok"],
            renormalize=hf["norm_topk_prob"],
            shared_hidden_width=shared,
            shared_gate=shared > 0,
            **grouping(sparse, layers),
        ),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a top-k model, with a gated shared expert or with none."""
    sparse = moe_layers(model)
    return {
        **without_head_width(decoder_settings_to_hf(model)),
        "model_type": "qwen2_moe",
        "intermediate_size": model.hidden_width,
        "moe_intermediate_size": model.moe.hidden_width,
        "shared_expert_intermediate_size": model.moe.shared_hidden_width,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.renormalize,
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
