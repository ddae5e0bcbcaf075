"""Folders as they come: sharded, in bfloat16, with dense layers, and broken in every way."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dynmoe_jax import config
from dynmoe_jax.interop import CheckpointError, load_hf
from dynmoe_jax.interop.architectures.dynamic_moe import DYNAMIC_MOE, model_from_hf
from dynmoe_jax.interop.architectures.mapping import parameter_slices
from dynmoe_jax.interop.described import configured
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.routing import TopP
from tests.interop.foreign_tensors import to_tensors

# Four layers, of which 0 and 2 are MoE; widths all different, so that no mix-up goes unseen.
SETTINGS = {
    "architectures": ["MoEForCausalLM"],
    "vocab_size": 20,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_experts": 5,
    "expert_frequency": 2,
    "max_position_embeddings": 32,
    "top_p_threshold": 0.3,
}
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def ours():
    """Parameters in our layout."""
    random = np.random.default_rng(3)
    shapes = parameter_shapes(model_from_hf(SETTINGS)).flat_state()
    return {path: random.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes}


@pytest.fixture(scope="module")
def tensors(ours):
    """The same in the released format."""
    shapes = {path: values.shape for path, values in ours.items()}
    return to_tensors(parameter_slices(DYNAMIC_MOE.rules, model_from_hf(SETTINGS), shapes), ours)


def parameters(decoder):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.state(decoder).flat_state()}


def write(folder, tensors, settings=SETTINGS):
    """A folder with one safetensors file."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(contiguous, folder / "model.safetensors")
    return folder


def write_sharded(folder, tensors):
    """The same in two files and an index."""
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate([names[::2], names[1::2]]):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: np.ascontiguousarray(tensors[name]) for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for path, values in wanted.items():
        np.testing.assert_array_equal(actual[path], values)


def test_settings():
    model = model_from_hf(SETTINGS)
    assert (model.num_layers, model.width, model.num_heads, model.head_width) == (4, 12, 3, 4)
    assert (model.hidden_width, model.moe.hidden_width, model.vocab_size) == (10, 10, 20)
    assert model.moe.route == TopP(0.3, renormalize=False)
    assert (model.moe.num_experts, model.moe.every_n_layers) == (5, 2)
    assert not model.tie_embeddings


def test_names_are_those_of_the_released_code(tensors):
    assert "model.layers.2.mlp.experts.4.down_proj.weight" in tensors
    assert "model.layers.3.mlp.mlp.down_proj.weight" in tensors
    assert "model.layers.3.mlp.router.weight" not in tensors
    # Embedding, head, last norm; per layer two norms and four projections; per MoE layer a router
    # and three matrices of five experts; per dense layer three.
    assert len(tensors) == 3 + 4 * 6 + 2 * (1 + 3 * 5) + 2 * 3
    assert tensors["model.layers.1.mlp.mlp.gate_proj.weight"].shape == (10, 12)


def test_layers_and_experts_land_where_they_belong(ours, tensors):
    moe, dense = ("groups", "layers", 0), ("groups", "layers", 1)
    np.testing.assert_array_equal(
        ours[*moe, "feed_forward", "gate_up_ED2F"][1, 4, :, 10:].T,
        tensors["model.layers.2.mlp.experts.4.up_proj.weight"],
    )
    np.testing.assert_array_equal(
        ours[*dense, "feed_forward", "gate_up_D2F"][1, :, :10].T,
        tensors["model.layers.3.mlp.mlp.gate_proj.weight"],
    )
    np.testing.assert_array_equal(
        ours[*dense, "attention", "output_HWD"][0, 2, 3],
        tensors["model.layers.1.self_attn.o_proj.weight"][:, 11],
    )


def test_round_trip(tmp_path, ours, tensors):
    loaded = load_hf(write(tmp_path, tensors | {BUFFER: np.zeros(2, np.float32)}))
    assert_same(parameters(loaded), ours)


def test_sharded(tmp_path, ours, tensors):
    assert_same(parameters(load_hf(write_sharded(tmp_path, tensors))), ours)


def test_bfloat16(tmp_path, ours, tensors):
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    loaded = parameters(load_hf(str(write(tmp_path, half))))
    assert all(values.dtype == np.float32 for values in loaded.values())
    rounded = {path: values.astype(ml_dtypes.bfloat16) for path, values in ours.items()}
    assert_same(loaded, rounded)


def test_tied_embeddings_need_no_head(tmp_path, tensors):
    headless = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    folder = write(tmp_path, headless, SETTINGS | {"tie_word_embeddings": True})
    assert load_hf(folder).config.tie_embeddings


HALF = {"threshold": 0.5}


def test_overrides(tmp_path, tensors):
    decoder = load_hf(write(tmp_path, tensors), backend="reference", remat="layer", top_p=HALF)
    assert decoder.config.moe.backend == "reference"
    assert decoder.config.remat == "layer"
    assert decoder.config.moe.top_p.threshold == 0.5


def test_an_override_leaves_other_settings_of_its_group_alone():
    foreign = SETTINGS | {"model_type": "dynamic_moe", "norm_topk_prob": True}
    _, cfg = configured(foreign, tensors=100, overrides={"top_p": HALF})
    assert cfg.model.moe.route == TopP(0.5, renormalize=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backnd": "grouped"}, "did you mean config.model.moe.backend"),
        ({"backend": "groupd"}, "did you mean 'grouped'"),
        ({"top_p": {"threshold": 1.5}}, "must be at most 1"),
        ({"top_p": 0.5}, "is called config.model.moe.top_p.threshold now"),
    ],
)
def test_wrong_override(tmp_path, tensors, overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        load_hf(write(tmp_path, tensors), **overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*MoEForCausalLM"),
        ({"architectures": None}, "'none'.*MoEForCausalLM"),
        ({"rope_theta": 500000.0}, "rope_theta=500000.0.*10000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 must divide"),
        ({"num_experts": -1}, "num_experts=-1"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
    ],
)
def test_settings_that_cannot_be(tmp_path, tensors, change, message):
    assert_one_sentence(write(tmp_path, tensors, SETTINGS | change), message)


def test_missing_setting(tmp_path, tensors):
    settings = {name: value for name, value in SETTINGS.items() if name != "hidden_size"}
    assert_one_sentence(write(tmp_path, tensors, settings), "lacks hidden_size")


def test_frequency_that_does_not_divide_the_layers(tmp_path, tensors):
    with pytest.raises(config.ConfigError, match="every_n_layers=3 must divide"):
        load_hf(write(tmp_path, tensors, SETTINGS | {"expert_frequency": 3}))


ROUTER = "model.layers.2.mlp.router.weight"


def test_unknown_tensor(tmp_path, tensors):
    name = "model.layers.1.mlp.router.weight"
    folder = write(tmp_path, tensors | {name: tensors[ROUTER]})
    assert_one_sentence(folder, f"tensor {name} has no place")


def test_missing_tensor(tmp_path, tensors):
    rest = {name: tensor for name, tensor in tensors.items() if name != ROUTER}
    assert_one_sentence(write(tmp_path, rest), f"tensor {ROUTER} is missing")


def test_tensor_of_another_shape(tmp_path, tensors):
    folder = write(tmp_path, tensors | {ROUTER: tensors[ROUTER].T})
    assert_one_sentence(folder, rf"tensor {ROUTER} has shape \[12, 5\].*\[5, 12\]")


def test_missing_files(tmp_path, tensors):
    assert_one_sentence(tmp_path, "config.json does not exist")
    write_sharded(tmp_path, tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_one_sentence(tmp_path, "model-00002-of-00002.safetensors does not exist")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_one_sentence(tmp_path, "model.safetensors does not exist")


def test_broken_files(tmp_path, tensors):
    write(tmp_path, tensors)
    (tmp_path / "model.safetensors").write_bytes(b"not this format at all")
    assert_one_sentence(tmp_path, "model.safetensors cannot be read as safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_one_sentence(tmp_path, "must hold a weight_map")
    (tmp_path / "config.json").write_text("{")
    assert_one_sentence(tmp_path, "config.json cannot be read as JSON")
    (tmp_path / "config.json").write_text("[]")
    assert_one_sentence(tmp_path, "must hold a JSON object")


def assert_one_sentence(folder, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
