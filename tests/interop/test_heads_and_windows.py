"""Widths of heads and sliding windows, as the configuration classes of transformers read them."""

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.architectures.registry import ARCHITECTURES, architecture_for
from tests.interop.small_models import settings_of, tensors_of, write

transformers = pytest.importorskip("transformers", reason="needs the extra test")


def model_of(name, **changes):
    return ARCHITECTURES[name].model_from_hf(settings_of(name, **changes))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize("head_dim", [4, 8, None])
def test_heads_are_as_wide_as_the_file_says(name, head_dim):
    kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
    theirs = kind(**settings_of(name, head_dim=head_dim))
    width = theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads
    assert model_of(name, head_dim=head_dim).head_width == width


def test_heads_of_qwen2_moe_that_do_not_share_the_width_evenly(tmp_path):
    name = "Qwen2MoeForCausalLM"
    tensors, random = tensors_of(name), np.random.default_rng(4)
    wide = {"q_proj.weight": (24, 12), "k_proj.weight": (8, 12), "v_proj.weight": (8, 12)}
    wide |= {"q_proj.bias": (24,), "k_proj.bias": (8,), "v_proj.bias": (8,)}
    wide |= {"o_proj.weight": (12, 24)}
    for layer in (0, 1):
        for part, shape in wide.items():
            value = random.normal(size=shape).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{part}"] = value
    decoder = load_hf(write(tmp_path, settings_of(name, head_dim=8), tensors))
    assert (decoder.config.num_heads, decoder.config.head_width) == (3, 8)


@pytest.mark.parametrize("name", ["OlmoeForCausalLM", "DeepseekForCausalLM"])
def test_heads_that_the_class_cannot_have_are_named(tmp_path, name):
    assert model_of(name, head_dim=4).head_width == 4
    folder = write(tmp_path, settings_of(name, head_dim=8), tensors_of(name))
    with pytest.raises(CheckpointError, match=r"head_dim=8.*hidden_size / num_attention_heads = 4"):
        load_hf(folder)


@pytest.mark.parametrize("bias", [True, False])
def test_wide_heads_are_exported_with_their_width(bias):
    """As Qwen2-MoE; OLMoE's norms of queries have the width of the model."""
    model = config.Model(
        num_layers=2, width=12, num_heads=3, num_kv_heads=1, head_width=8, hidden_width=10,
        attention_bias=bias, moe=config.MoE(num_experts=4, router="top_k", hidden_width=6),
    )  # fmt: skip
    architecture = architecture_for(model)
    assert architecture.name == "Qwen2MoeForCausalLM"
    assert architecture.model_to_hf(model)["head_dim"] == 8
    with pytest.raises(CheckpointError, match=r"config\.model\.(qk_norm|head_width)"):
        architecture_for(config.Model(**vars(model) | {"qk_norm": True, "attention_bias": False}))


@pytest.mark.parametrize("window", [32, 33, 4096, None])
def test_a_window_that_holds_every_position_changes_nothing(window):
    model = model_of("MixtralForCausalLM", sliding_window=window)
    assert model == model_of("MixtralForCausalLM")


@pytest.mark.parametrize("window", [31, 1, 0, "32", 32.0, True])
def test_a_window_that_does_not_is_refused(window):
    with pytest.raises(CheckpointError, match=f"sliding_window={window!r}"):
        model_of("MixtralForCausalLM", sliding_window=window)


def sliding(name, **changes):
    """Whether any layer of transformers' configuration slides over fewer positions than all."""
    kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
    theirs = kind(**settings_of(name, **changes))
    layers = getattr(theirs, "layer_types", None) or ["sliding_attention"]
    window = theirs.sliding_window
    return "sliding_attention" in layers and window is not None and window < 32


QWEN = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    "changes",
    [
        QWEN,
        QWEN | {"sliding_window": 32},
        QWEN | {"max_window_layers": 0},
        QWEN | {"use_sliding_window": False},
        QWEN | {"layer_types": ["full_attention"] * 2},
        QWEN | {"layer_types": ["full_attention", "sliding_attention"]},
        QWEN | {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2},
        {"use_sliding_window": True},
    ],
)
def test_qwen2_moe_slides_where_transformers_does(changes):
    if sliding("Qwen2MoeForCausalLM", **changes):
        with pytest.raises(CheckpointError, match="sliding_window"):
            model_of("Qwen2MoeForCausalLM", **changes)
    else:
        model = model_of("Qwen2MoeForCausalLM", **changes)
        assert model == model_of("Qwen2MoeForCausalLM")
