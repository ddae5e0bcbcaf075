"""Mixtral (arXiv 2401.04088), as ``MixtralForCausalLM`` of transformers."""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.llama import (
    DECODER_RULES,
    DEFAULTS,
    LAYER,
    REQUIRED,
    decoder_settings,
    decoder_settings_to_hf,
)
from dynmoe_jax.interop.architectures.mapping import GATE, UP, Rule
from dynmoe_jax.interop.settings import check_alias, check_window, read_settings

_DEFAULTS = DEFAULTS | {
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
}
_FIXED = {"model_type": "mixtral", "hidden_act": "silu"}


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Raises:
      CheckpointError: a setting is missing, or asks for what our model does not compute.
    """
    required = (*REQUIRED, "intermediate_size", "num_local_experts")
    hf = read_settings(settings, required=required, defaults=_DEFAULTS, fixed=_FIXED)
    check_alias(hf, "num_local_experts", "num_experts")
    check_window("sliding_window", hf.get("sliding_window"), hf["max_position_embeddings"])
    return config.Model(
        **decoder_settings(hf, theta=1e6, kv_heads=8),
        moe=config.MoE(
            router="top_k",
            num_experts=hf["num_local_experts"],
            hidden_width=hf["intermediate_size"],
            top_k={"k": hf["num_experts_per_tok"], "renormalize": True},
        ),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a renormalised top-k model with experts in every layer."""
    return {
        **decoder_settings_to_hf(model),
        "model_type": "mixtral",
        "intermediate_size": model.moe.hidden_width,
        "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k.k,
        "sliding_window": None,
    }


_EXPERT = LAYER + "block_sparse_moe.experts.{expert}."

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=(
        *DECODER_RULES,
        Rule(LAYER + "block_sparse_moe.gate.weight", "feed_forward.router_DE"),
        Rule(_EXPERT + "w1.weight", "feed_forward.gate_up_ED2F", half=GATE),
        Rule(_EXPERT + "w3.weight", "feed_forward.gate_up_ED2F", half=UP),
        Rule(_EXPERT + "w2.weight", "feed_forward.down_EFD"),
    ),
)
