"""The released model of "Harder Tasks Need More Experts" (arXiv 2403.07652).

Format of github.com/ZhenweiAn/Dynamic_MoE, ``MoEForCausalLM``: Llama with other names for the norms
and, in layer i with ``i % expert_frequency == 0``, a Top-P mixture of experts.

An exported model carries code of this package (``modeling_dynamic_moe.py``), which is that
architecture and a little more: grouped-query attention, another base of the rotary frequencies,
experts of their own width, renormalised weights.  Its ``model_type`` tells it from a released one.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.layouts import Linear, Same
from dynmoe_jax.interop.architectures.llama import (
    BUFFERS,
    DEFAULTS,
    LAYER,
    REQUIRED,
    decoder_settings,
    decoder_settings_to_hf,
)
from dynmoe_jax.interop.architectures.mapping import GATE, UP, Rule
from dynmoe_jax.interop.settings import read_settings

_DEFAULTS = DEFAULTS | {"expert_frequency": 2, "top_p_threshold": 0.4, "norm_topk_prob": False}
_MODEL_TYPE = "dynamic_moe"
# The released modeling file computes nothing else, whatever the configuration says.
_RELEASED = {
    "hidden_act": "silu",
    "rope_scaling": None,
    "rope_parameters": None,
    "rope_theta": 10000.0,
}
_NOT_READ = ("num_key_value_heads", "head_dim", "moe_intermediate_size", "norm_topk_prob")


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Of a released model ``num_key_value_heads`` is not read: its attention has as many as query
    heads.

    Raises:
      CheckpointError: a setting is missing, or asks for what the model's code does not compute.
    """
    fixed = {"hidden_act": "silu"}
    if settings.get("model_type") != _MODEL_TYPE:
        settings = {name: value for name, value in settings.items() if name not in _NOT_READ}
        fixed = _RELEASED
    required = (*REQUIRED, "intermediate_size", "num_experts")
    hf = read_settings(settings, required=required, defaults=_DEFAULTS, fixed=fixed)
    return config.Model(
        **decoder_settings(hf),
        hidden_width=hf["intermediate_size"],
        moe=config.MoE(
            router="top_p",
            num_experts=hf["num_experts"],
            hidden_width=hf.get("moe_intermediate_size") or hf["intermediate_size"],
            top_p={"threshold": hf["top_p_threshold"], "renormalize": hf["norm_topk_prob"]},
            every_n_layers=hf["expert_frequency"],
        ),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a Top-P model, for the code that travels with it."""
    return {
        **decoder_settings_to_hf(model),
        "model_type": _MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_dynamic_moe.DynamicMoEConfig",
            "AutoModel": "modeling_dynamic_moe.MoEModel",
            "AutoModelForCausalLM": "modeling_dynamic_moe.MoEForCausalLM",
        },
        "intermediate_size": model.hidden_width,
        "moe_intermediate_size": model.moe.hidden_width,
        "num_experts": model.moe.num_experts,
        "top_p_threshold": model.moe.top_p.threshold,
        "norm_topk_prob": model.moe.top_p.renormalize,
        "expert_frequency": model.moe.every_n_layers,
    }


_EXPERT = LAYER + "mlp.experts.{expert}."

DYNAMIC_MOE = Architecture(
    name="MoEForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=(
        Rule("model.embed_tokens.weight", "embedding_VD", Same()),
        Rule(LAYER + "input_norm.weight", "attention_norm.scale", Same()),
        Rule(LAYER + "self_attn.q_proj.weight", "attention.query_DHW"),
        Rule(LAYER + "self_attn.k_proj.weight", "attention.key_DGW"),
        Rule(LAYER + "self_attn.v_proj.weight", "attention.value_DGW"),
        Rule(LAYER + "self_attn.o_proj.weight", "attention.output_HWD", Linear(input_axes=2)),
        Rule(LAYER + "post_attention_norm.weight", "feed_forward_norm.scale", Same()),
        Rule(LAYER + "mlp.router.weight", "feed_forward.router_DE"),
        Rule(_EXPERT + "gate_proj.weight", "feed_forward.gate_up_ED2F", half=GATE),
        Rule(_EXPERT + "up_proj.weight", "feed_forward.gate_up_ED2F", half=UP),
        Rule(_EXPERT + "down_proj.weight", "feed_forward.down_EFD"),
        Rule(LAYER + "mlp.mlp.gate_proj.weight", "feed_forward.gate_up_D2F", half=GATE),
        Rule(LAYER + "mlp.mlp.up_proj.weight", "feed_forward.gate_up_D2F", half=UP),
        Rule(LAYER + "mlp.mlp.down_proj.weight", "feed_forward.down_FD"),
        Rule("model.norm.weight", "norm.scale", Same()),
        Rule("lm_head.weight", "head_DV"),
    ),
    ignored=BUFFERS,
    code=("configuration_dynamic_moe.py", "modeling_dynamic_moe.py"),
)
