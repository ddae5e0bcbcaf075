"""Llama (arXiv 2302.13971) and what has its shape, as ``LlamaForCausalLM`` of transformers.

The other architectures are this one with other feed-forwards: they take its names of tensors and
of settings from here, in both directions.
"""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.layouts import Linear, Same
from dynmoe_jax.interop.architectures.mapping import GATE, UP, Rule
from dynmoe_jax.interop.quoted import shown
from dynmoe_jax.interop.settings import check_count, read_settings, rope_theta
from dynmoe_jax.runs.errors import CheckpointError

REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}

LAYER = "model.layers.{layer}."
DECODER_RULES = (
    Rule("model.embed_tokens.weight", "embedding_VD", Same()),
    Rule(LAYER + "input_layernorm.weight", "attention_norm.scale", Same()),
    Rule(LAYER + "self_attn.q_proj.weight", "attention.query_DHW"),
    Rule(LAYER + "self_attn.k_proj.weight", "attention.key_DGW"),
    Rule(LAYER + "self_attn.v_proj.weight", "attention.value_DGW"),
    Rule(LAYER + "self_attn.o_proj.weight", "attention.output_HWD", Linear(input_axes=2)),
    Rule(LAYER + "post_attention_layernorm.weight", "feed_forward_norm.scale", Same()),
    Rule("model.norm.weight", "norm.scale", Same()),
    Rule("lm_head.weight", "head_DV"),
)
DENSE_RULES = (
    Rule(LAYER + "mlp.gate_proj.weight", "feed_forward.gate_up_D2F", half=GATE),
    Rule(LAYER + "mlp.up_proj.weight", "feed_forward.gate_up_D2F", half=UP),
    Rule(LAYER + "mlp.down_proj.weight", "feed_forward.down_FD"),
)
EXPERT = LAYER + "mlp.experts.{expert}."
EXPERT_RULES = (
    Rule(LAYER + "mlp.gate.weight", "feed_forward.router_DE"),
    Rule(EXPERT + "gate_proj.weight", "feed_forward.gate_up_ED2F", half=GATE),
    Rule(EXPERT + "up_proj.weight", "feed_forward.gate_up_ED2F", half=UP),
    Rule(EXPERT + "down_proj.weight", "feed_forward.down_EFD"),
)
"""Qwen2-MoE, OLMoE and DeepSeekMoE name them alike."""

BUFFERS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Saved by old versions of transformers; computed everywhere."""


def decoder_settings(
    hf: Mapping[str, Any], theta: float = 10000.0, kv_heads: int | None = None
) -> dict[str, Any]:
    """The settings of :class:`config.Model` that all architectures name alike.

    Args:
      hf: settings of ``config.json``, completed.
      theta: base of the rotary frequencies, where none is given.
      kv_heads: key/value heads, where nothing is said of them; None: as many as query heads.

    Raises:
      CheckpointError: the heads do not divide the width, or the positions are scaled.
    """
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    kv_heads, head_width = hf.get("num_key_value_heads", kv_heads), hf.get("head_dim")
    for name, value in (("num_key_value_heads", kv_heads), ("head_dim", head_width)):
        if value is not None:
            check_count(name, value)
    if head_width is None and width % heads:
        raise CheckpointError(
            f"config.json has hidden_size={width}, which num_attention_heads={heads} must divide."
        )
    return {
        "num_layers": hf["num_hidden_layers"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": kv_heads or heads,
        "head_width": head_width or width // heads,
        "vocab_size": hf["vocab_size"],
        "max_seq_len": hf["max_position_embeddings"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "rope_theta": rope_theta(hf, theta),
        "norm_epsilon": hf["rms_norm_eps"],
        "init_std": hf["initializer_range"],
    }


def decoder_settings_to_hf(model: config.Model) -> dict[str, Any]:
    """The inverse of :func:`decoder_settings`."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_width,
        "max_position_embeddings": model.max_seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
    }


def check_even_heads(hf: Mapping[str, Any]) -> None:
    """Checks the ``head_dim`` of an architecture whose heads share the width evenly.

    Raises:
      CheckpointError: it is another one.
    """
    width, heads, asked = hf["hidden_size"], hf["num_attention_heads"], hf.get("head_dim")
    if asked is not None and width % heads == 0 and asked != width // heads:
        raise CheckpointError(
            f"config.json has head_dim={shown(asked)}, but heads of this architecture have the "
            f"width hidden_size / num_attention_heads = {width // heads}."
        )


def without_head_width(hf: dict[str, Any]) -> dict[str, Any]:
    """The settings of an architecture whose heads share the width evenly."""
    return {name: value for name, value in hf.items() if name != "head_dim"}


def model_from_hf(settings: Mapping[str, Any]) -> config.Model:
    """The model settings that a ``config.json`` describes.

    Raises:
      CheckpointError: a setting is missing, or asks for what our model does not compute.
    """
    hf = read_settings(
        settings, required=(*REQUIRED, "intermediate_size"), defaults=DEFAULTS, fixed=_FIXED
    )
    return config.Model(
        **decoder_settings(hf),
        hidden_width=hf["intermediate_size"],
        moe=config.MoE(every_n_layers=0),
    )


def model_to_hf(model: config.Model) -> dict[str, Any]:
    """``config.json`` of a dense model."""
    return {
        **decoder_settings_to_hf(model),
        "model_type": "llama",
        "intermediate_size": model.hidden_width,
    }


LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_from_hf=model_from_hf,
    model_to_hf=model_to_hf,
    rules=DECODER_RULES + DENSE_RULES,
    ignored=BUFFERS,
)
