"""Every setting that defines a model, one step away: taken over, refused or written, never lost."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks.config_fuzz import choosing
from dynmoe_jax import config
from dynmoe_jax.interop import CheckpointError
from dynmoe_jax.interop.architectures.registry import architecture_for
from dynmoe_jax.model import decoder_structure, parameter_shapes
from dynmoe_jax.runs.begun import check_compatible
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.training.initial_model import with_initial_model

MOE = config.MoE(num_experts=4, hidden_width=8)
TINY = config.Model(
    num_layers=2,
    width=8,
    num_heads=2,
    num_kv_heads=2,
    head_width=4,
    hidden_width=8,
    vocab_size=8,
    max_seq_len=8,
    moe=MOE,
)


def tiny(moe=None, **changes):
    return dataclasses.replace(TINY, moe=dataclasses.replace(MOE, **(moe or {})), **changes)


BASES = {
    "LlamaForCausalLM": tiny({"every_n_layers": 0}),
    "Qwen2MoeForCausalLM": tiny(
        {"router": "top_k", "every_n_layers": 2, "shared_hidden_width": 8, "shared_gate": True},
        attention_bias=True,
        num_layers=4,
    ),
    "MoEForCausalLM": tiny(),
}
LEAVES = {path: (field, value) for path, field, value in config.walk(TINY)}
DEFINING = [path for path, (field, _) in LEAVES.items() if field.metadata["defines_model"]]
OTHERS = [path for path in LEAVES if path not in DEFINING]
TEXTS = {
    "layers": ("1:moe.hidden_width=12", "1:hidden_width=12"),
    "lora.targets": ("query",),
    "two_layer.targets": ("query",),
}
"""Other values of settings that are free text."""


def run_of(model):
    return config.Config(model=model, data=config.Data(seq_len=4, tokenizer="any.model"))


def with_value(group, path, value):
    name, _, rest = path.partition(".")
    if rest:
        value = with_value(getattr(group, name), rest, value)
    return dataclasses.replace(group, **{name: value})


def with_kind_of(model, path):
    """The model with the kind chosen that a setting belongs to."""
    for choice, kind in choosing(f"model.{path}").items():
        model = with_value(model, choice.removeprefix("model."), kind)
    return model


def one_step_away(model, path):
    """(model with the nearest other value of one setting, the value); None if none is allowed."""
    field, _ = LEAVES[path]
    value = values(model)[path]
    if isinstance(value, bool):
        candidates = [not value]
    elif path == "layers":
        candidates = ["0:num_kv_heads=1"]
    elif isinstance(value, str):
        choices = field.metadata["choices"] or TEXTS.get(path, ())
        candidates = [choice for choice in choices if choice != value]
    else:
        candidates = [value + 1, value - 1, value * 2, value / 2]
    for candidate in map(type(value), candidates):
        with contextlib.suppress(config.ConfigError):
            if candidate != value:
                return run_of(with_value(model, path, candidate)).model, candidate
    return None


def values(model):
    return {path: value for path, _, value in config.walk(model)}


def computation(model):
    """The arithmetic of a model, as JAX traces it."""
    structure = decoder_structure(model)
    run = lambda params, tokens: nnx.merge(structure, params)(tokens).logits  # noqa: E731
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return str(jax.make_jaxpr(run)(parameter_shapes(model), tokens))


EXPORTS = [
    (path, name)
    for path in DEFINING
    for name, base in BASES.items()
    if with_kind_of(base, path) == base and one_step_away(base, path)
]


BASE_OF = {
    path: chosen
    for path in DEFINING
    for chosen in (with_kind_of(base, path) for base in BASES.values())
    if one_step_away(chosen, path)
}
"""A model whose other settings let a setting change."""


def test_every_setting_of_a_model_is_looked_at():
    assert BASE_OF.keys() == set(DEFINING)
    assert {"attention_bias", "moe.routed_scale", "max_seq_len"} <= set(DEFINING)
    assert {"attention", "unroll", "moe.backend"} <= set(OTHERS)


@pytest.mark.parametrize("path", DEFINING)
def test_beginning_with_another_model_takes_it_over(path, tmp_path):
    model, value = one_step_away(BASE_OF[path], path)
    with contextlib.closing(Checkpoints(tmp_path, config.Checkpoint())) as checkpoints:
        checkpoints.save(3, {"params": {"x": jnp.zeros(1)}}, {"tokenizer": ""}, run_of(model))
    own = run_of(tiny(max_seq_len=4, dtype="bfloat16", unroll=1))
    own = dataclasses.replace(own, train=config.Train(init_from=str(tmp_path)))
    begun = with_initial_model(own, tmp_path / "new").model
    assert values(begun)[path] == value
    assert (begun.dtype, begun.unroll) == ("bfloat16", 1)


@pytest.mark.parametrize("path", DEFINING)
def test_continuing_with_another_value_is_refused(path, tmp_path):
    base = BASE_OF[path]
    changed, _ = one_step_away(base, path)
    if path == "max_seq_len":  # the one that may grow: it sizes no parameter
        return check_compatible(run_of(base), run_of(changed), tmp_path)
    with pytest.raises(config.ConfigError, match=rf"config\.model\.{path}="):
        check_compatible(run_of(base), run_of(changed), tmp_path)


@pytest.mark.parametrize(("path", "name"), EXPORTS)
def test_export_writes_or_refuses_it(path, name):
    base = BASES[name]
    assert architecture_for(base).name == name
    changed, value = one_step_away(base, path)
    try:
        architecture = architecture_for(changed)
    except CheckpointError as error:
        assert "no format of Hugging Face's has" in str(error)  # noqa: PT017
        return
    written = architecture.model_from_hf(architecture.model_to_hf(changed))
    same = values(written)[path] == value
    assert same or computation(written) == computation(changed)


OF_THE_SAME_MODEL = [
    path
    for path in OTHERS
    if all(choice.removeprefix("model.") in OTHERS for choice in choosing(f"model.{path}"))
]
"""Others are of kinds that no format of theirs has, such as the pace of a router's state."""


@pytest.mark.parametrize("path", OF_THE_SAME_MODEL)
def test_the_way_of_computing_does_not_keep_a_model_from_export(path):
    base = with_kind_of(BASES["MoEForCausalLM"], path)
    changed, _ = one_step_away(base, path)
    architecture = architecture_for(changed)
    assert architecture.name == "MoEForCausalLM"
    assert architecture.model_to_hf(changed) == architecture.model_to_hf(base)
