"""DeepSeekMoE (arXiv 2401.06066), version 1, as ``DeepseekForCausalLM`` of its released code.

transformers has no class for it: a model loads with the code that deepseek-ai/deepseek-moe-16b-base
holds (``trust_remote_code=True``), which an exported folder refers to.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.llama import (
    BUFFERS,
    DECODER_RULES,
    DEFAULTS,
    DENSE_RULES,
    EXPERT_RULES,
    LAYER,
    REQUIRED,
    check_even_heads,
    decoder_settings,
    decoder_settings_to_hf,
    without_head_width,
)
from dynmoe_jax.interop.architectures.mapping import GATE, UP, Rule
from dynmoe_jax.interop.architectures.moe_layers import grouping, moe_layers
from dynmoe_jax.interop.settings import read_settings

_DEFAULTS = DEFAULTS | {
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_shared_experts": 0,
    "norm_topk_prob": False,
}
_FIXED = {
    "model_type": "deepseek",
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "softmax",
    "routed_scaling_factor": 1.0,
}
_REPOSITORY = "deepseek-ai/deepseek-moe-16b-base"
_SHARED = LAYER + "mlp.shared_experts."


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Raises:
      CheckpointError: a setting is missing, or asks for what our model does not compute.
    """
    required = (*REQUIRED, "intermediate_size", "moe_intermediate_size")
    required += ("n_routed_experts", "num_experts_per_tok")
    hf = read_settings(settings, required=required, defaults=_DEFAULTS, fixed=_FIXED)
    check_even_heads(hf)
    layers, k = hf["num_hidden_layers"], hf["num_experts_per_tok"]
    first, frequency = hf["first_k_dense_replace"], hf["moe_layer_freq"]
    return config.Model(
        **decoder_settings(hf),
        hidden_width=hf["intermediate_size"],
        moe=config.MoE(
            router="top_k",
            num_experts=hf["n_routed_experts"],
            hidden_width=hf["moe_intermediate_size"],
            # The released code does not renormalise the weight of one expert.
            top_k={"k": k, "renormalize": hf["norm_topk_prob"] and k > 1},
            # Its shared experts are one feed-forward as wide as all of them.
            shared_hidden_width=hf["n_shared_experts"] * hf["moe_intermediate_size"],
            **grouping([i for i in range(first, layers) if i % frequency == 0], layers),
        ),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a top-k model with shared experts, or none, without a gate."""
    sparse = moe_layers(model)
    return {
        **without_head_width(decoder_settings_to_hf(model)),
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": f"{_REPOSITORY}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_REPOSITORY}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_REPOSITORY}--modeling_deepseek.DeepseekForCausalLM",
        },
        "intermediate_size": model.hidden_width,
        "moe_intermediate_size": model.moe.hidden_width,
        "n_routed_experts": model.moe.num_experts,
        "n_shared_experts": model.moe.shared_hidden_width // model.moe.hidden_width or None,
        "num_experts_per_tok": model.moe.top_k.k,
        "norm_topk_prob": model.moe.top_k.renormalize,
        "scoring_func": "softmax",
        "first_k_dense_replace": sparse[0] if sparse else model.num_layers,
        "moe_layer_freq": model.moe.every_n_layers or 1,
    }


DEEPSEEK = Architecture(
    name="DeepseekForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=(
        *DECODER_RULES,
        *DENSE_RULES,
        *EXPERT_RULES,
        Rule(_SHARED + "gate_proj.weight", "feed_forward.shared_gate_up_D2F", half=GATE),
        Rule(_SHARED + "up_proj.weight", "feed_forward.shared_gate_up_D2F", half=UP),
        Rule(_SHARED + "down_proj.weight", "feed_forward.shared_down_FD"),
    ),
    ignored=BUFFERS,
)
