"""The released model of "Harder Tasks Need More Experts" (arXiv 2403.07652).

Format of github.com/ZhenweiAn/Dynamic_MoE, ``MoEForCausalLM``: Llama with other names for the norms
and, in layer i with ``i % expert_frequency == 0``, a Top-P mixture of experts.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architecture import Architecture
from dynmoe_jax.interop.errors import CheckpointError
from dynmoe_jax.interop.layouts import Linear, Same
from dynmoe_jax.interop.mapping import GATE, UP, Rule

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
)
_DEFAULTS = {
    "expert_frequency": 2,
    "top_p_threshold": 0.4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# The released modeling file computes nothing else, whatever the configuration says.
_FIXED = {"hidden_act": "silu", "rope_scaling": None, "rope_theta": 10000.0}


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    ``num_key_value_heads`` is not read: the released attention has as many as query heads.

    Raises:
      CheckpointError: a setting is missing, or asks for what the released code does not compute.
    """
    for name in _REQUIRED:
        if name not in settings:
            raise CheckpointError(f"config.json lacks {name}.")
        if type(settings[name]) is not int or settings[name] < 1:
            raise CheckpointError(f"config.json has {name}={settings[name]!r}, not a count.")
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"config.json asks for {name}={settings[name]!r}, but this architecture computes "
                f"{value!r} alone."
            )
    hf = _DEFAULTS | dict(settings)
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if width % heads:
        raise CheckpointError(
            f"config.json has hidden_size={width}, which num_attention_heads={heads} must divide."
        )
    return config.Model(
        num_layers=hf["num_hidden_layers"],
        width=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_width=width // heads,
        hidden_width=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        max_seq_len=hf["max_position_embeddings"],
        tie_embeddings=hf["tie_word_embeddings"],
        norm_epsilon=hf["rms_norm_eps"],
        init_std=hf["initializer_range"],
        moe=config.MoE(
            router="top_p",
            num_experts=hf["num_experts"],
            hidden_width=hf["intermediate_size"],
            top_p=hf["top_p_threshold"],
            renormalize=False,
            every_n_layers=hf["expert_frequency"],
        ),
    )


_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."

DYNAMIC_MOE = Architecture(
    model_from_hf=model_from_hf,
    rules=(
        Rule("model.embed_tokens.weight", "embedding_VD", Same()),
        Rule(_LAYER + "input_norm.weight", "attention_norm.scale", Same()),
        Rule(_LAYER + "self_attn.q_proj.weight", "attention.query_DHW"),
        Rule(_LAYER + "self_attn.k_proj.weight", "attention.key_DGW"),
        Rule(_LAYER + "self_attn.v_proj.weight", "attention.value_DGW"),
        Rule(_LAYER + "self_attn.o_proj.weight", "attention.output_HWD", Linear(input_axes=2)),
        Rule(_LAYER + "post_attention_norm.weight", "feed_forward_norm.scale", Same()),
        Rule(_LAYER + "mlp.router.weight", "feed_forward.router_DE"),
        Rule(_EXPERT + "gate_proj.weight", "feed_forward.gate_up_ED2F", half=GATE),
        Rule(_EXPERT + "up_proj.weight", "feed_forward.gate_up_ED2F", half=UP),
        Rule(_EXPERT + "down_proj.weight", "feed_forward.down_EFD"),
        Rule(_LAYER + "mlp.mlp.gate_proj.weight", "feed_forward.gate_up_D2F", half=GATE),
        Rule(_LAYER + "mlp.mlp.up_proj.weight", "feed_forward.gate_up_D2F", half=UP),
        Rule(_LAYER + "mlp.mlp.down_proj.weight", "feed_forward.down_FD"),
        Rule("model.norm.weight", "norm.scale", Same()),
        Rule("lm_head.weight", "head_DV"),
    ),
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
