"""Settings that transformers reads from a ``config.json``, by the names of our model."""

import contextlib
import json

import transformers

from dynmoe_jax.interop.architectures.moe_layers import moe_layers

transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)


def theirs(folder, name):
    """Settings of a model of a class, as its configuration reads a folder.

    Returns:
      what is read, by our names; the reason as a text where transformers refuses the folder.
    """
    kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
    try:
        # Without a model_type it would guess by the folder's name.
        typed = json.loads((folder / "config.json").read_text()).get("model_type")
        cfg = (transformers.AutoConfig if typed else kind).from_pretrained(folder)
        return facts(cfg) if type(cfg) is kind else f"of {type(cfg).__name__}"
    except Exception as error:  # of any kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def facts(cfg):
    """Facts of a configuration of transformers."""
    rope = cfg.rope_parameters
    found = {
        "num_layers": cfg.num_hidden_layers,
        "width": cfg.hidden_size,
        "num_heads": cfg.num_attention_heads,
        "num_kv_heads": cfg.num_key_value_heads,
        "head_width": getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads,
        "vocab_size": cfg.vocab_size,
        "max_seq_len": cfg.max_position_embeddings,
        "tie_embeddings": cfg.tie_word_embeddings,
        "rope_theta": rope["rope_theta"],
        "norm_epsilon": cfg.rms_norm_eps,
        "init_std": cfg.initializer_range,
        # Of what is computed in one way alone.
        "act": {"swish": "silu"}.get(cfg.hidden_act, cfg.hidden_act),
        "rope_type": rope["rope_type"],
        "other_biases": {
            "llama": lambda: cfg.attention_bias or cfg.mlp_bias,
            "olmoe": lambda: cfg.attention_bias,
        }.get(cfg.model_type, bool)(),
        "clip": cfg.clip_qkv if cfg.model_type == "olmoe" else None,
        "slides": slides(cfg),
        "quantised": bool(getattr(cfg, "quantization_config", None)),
        "experts": None,
    }  # fmt: skip
    if cfg.model_type == "llama":
        return found | {"hidden_width": cfg.intermediate_size}
    return found | {"experts": experts(cfg)}


def experts(cfg):
    layers = list(range(cfg.num_hidden_layers))
    kind = {"experts": cfg.num_experts, "k": cfg.num_experts_per_tok, "shared": 0}
    if cfg.model_type != "qwen2_moe":
        renormalised = cfg.model_type == "mixtral" or cfg.norm_topk_prob
        return kind | {"layers": layers, "width": cfg.intermediate_size, "norm": renormalised}
    dense, step = cfg.mlp_only_layers, cfg.decoder_sparse_step
    return kind | {
        "layers": [i for i in layers if i not in dense and (i + 1) % step == 0],
        "width": cfg.moe_intermediate_size,
        "norm": cfg.norm_topk_prob,
        "shared": cfg.shared_expert_intermediate_size,
        "dense": cfg.intermediate_size,
        "bias": cfg.qkv_bias,
    }


def slides(cfg):
    """Whether a layer attends to fewer positions than the model reads."""
    window = getattr(cfg, "sliding_window", None)
    if cfg.model_type == "llama":
        return False
    if cfg.model_type == "qwen2_moe" and "sliding_attention" not in cfg.layer_types:
        return False
    return window is not None and window < cfg.max_position_embeddings


def ours(model, name):
    """The same facts of our settings."""
    found = {
        key: getattr(model, key)
        for key in (
            "num_layers", "width", "num_heads", "num_kv_heads", "head_width", "vocab_size",
            "max_seq_len", "tie_embeddings", "rope_theta", "norm_epsilon", "init_std",
        )
    }  # fmt: skip
    found |= {"act": "silu", "rope_type": "default", "other_biases": False, "clip": None}
    found |= {"slides": False, "quantised": False, "experts": None}
    moe = model.moe
    if name == "LlamaForCausalLM":
        return found | {"hidden_width": model.hidden_width}
    kind = {"experts": moe.num_experts, "k": moe.route.k, "shared": moe.shared_hidden_width}
    kind |= {"layers": moe_layers(model), "width": moe.hidden_width, "norm": moe.route.renormalize}
    if name == "Qwen2MoeForCausalLM":
        kind |= {"dense": model.hidden_width, "bias": model.attention_bias}
    return found | {"experts": kind}


def differences(one, other):
    """Names of the facts that differ."""
    with contextlib.suppress(AttributeError):
        return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return [f"{one} or {other}"]
