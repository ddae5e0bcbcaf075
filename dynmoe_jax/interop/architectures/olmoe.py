"""OLMoE (arXiv 2409.02060), as ``OlmoeForCausalLM`` of transformers: norms of queries and keys."""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.layouts import Folded
from dynmoe_jax.interop.architectures.llama import (
    DECODER_RULES,
    DEFAULTS,
    EXPERT_RULES,
    LAYER,
    REQUIRED,
    check_even_heads,
    decoder_settings,
    decoder_settings_to_hf,
    without_head_width,
)
from dynmoe_jax.interop.architectures.mapping import Rule
from dynmoe_jax.interop.settings import check_alias, check_window, read_settings

_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": False,
}
_FIXED = {"model_type": "olmoe", "hidden_act": "silu", "attention_bias": False, "clip_qkv": None}


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Raises:
      CheckpointError: a setting is missing, or asks for what our model does not compute.
    """
    required = (*REQUIRED, "intermediate_size", "num_experts")
    hf = read_settings(settings, required=required, defaults=_DEFAULTS, fixed=_FIXED)
    # The norm of the queries has the width of the model.
    check_even_heads(hf)
    check_alias(hf, "num_experts", "num_local_experts")
    check_window("sliding_window", hf.get("sliding_window"), hf["max_position_embeddings"])
    return config.Model(
        **decoder_settings(hf),
        qk_norm=True,
        moe=config.MoE(
            router="top_k",
            num_experts=hf["num_experts"],
            hidden_width=hf["intermediate_size"],
            top_k={"k": hf["num_experts_per_tok"], "renormalize": hf["norm_topk_prob"]},
        ),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a top-k model with norms of queries and keys, experts in every layer."""
    return {
        **without_head_width(decoder_settings_to_hf(model)),
        "model_type": "olmoe",
        "intermediate_size": model.moe.hidden_width,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k.k,
        "norm_topk_prob": model.moe.top_k.renormalize,
        "clip_qkv": None,
    }


OLMOE = Architecture(
    name="OlmoeForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=(
        *DECODER_RULES,
        Rule(LAYER + "self_attn.q_norm.weight", "attention.query_scale_HW", Folded()),
        Rule(LAYER + "self_attn.k_norm.weight", "attention.key_scale_GW", Folded()),
        *EXPERT_RULES,
    ),
)
