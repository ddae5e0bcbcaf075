"""Settings: every check, and that every mistake is one sentence with a remedy."""

import dataclasses
import json
import math

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.config_fuzz import choosing, nested
from dynmoe_jax import config
from dynmoe_jax.registry import OBJECTIVES

LEAVES = list(config.walk(config.Config()))
NUMBERS = [(path, field) for path, field, _ in LEAVES if field.type in (int, float)]
# A base in which single settings can go to the edges of their ranges without contradicting others.
BASE = {
    "model.max_seq_len": 10**6,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "train.batch_size": 1,
    "data.seq_len": 2,
}
MODEL = config.Config().model
# Settings whose range is wider than what other settings leave of it.
CONTRADICTS = {
    ("model.max_seq_len", 1),
    # One axis takes what is left, and that is the data axis unless it has a number.
    ("mesh.slice", -1),
    ("mesh.expert", -1),
    ("mesh.model", -1),
    ("checkpoint.every_steps", 0),
}


def build(path=None, value=None):
    """The base with another value of one setting, whose kind is chosen if it belongs to one."""
    one = {} if path is None else choosing(path) | {path: value}
    if path == "train.objective" and value in OBJECTIVES and OBJECTIVES[value]().obstacle(MODEL):
        one["model.moe.every_n_layers"] = 0
    return config.from_config_dict(nested(BASE | one))


def error_of(path, value):
    """The message of the ConfigError that a value gives."""
    with pytest.raises(config.ConfigError) as caught:
        build(path, value)
    message = str(caught.value)
    assert "\n" not in message
    assert f"config.{path}" in message
    return message


def leaf(built, path):
    return {p: v for p, _, v in config.walk(built)}[path]


def test_defaults_are_valid():
    assert config.from_config_dict({}) == config.Config()
    assert build() == config.from_config_dict(nested(BASE))


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, field, _ in LEAVES])
def test_every_setting_explains_itself(path, field):
    assert len(field.metadata["help"]) >= 5
    assert field.metadata["help"][-1] != "."
    if field.type in (int, float):
        assert any(field.metadata[rule] is not None for rule in ("low", "above"))


@pytest.mark.parametrize(("path", "field"), NUMBERS)
def test_range_edges(path, field):
    rule, kind = field.metadata, field.type
    step = (lambda x, up: x + (1 if up else -1)) if kind is int else step_float
    accepted, refused = [], []
    if rule["low"] is not None:
        accepted.append(kind(rule["low"]))
        refused.append((step(kind(rule["low"]), False), f"at least {rule['low']:g}"))
    if rule["above"] is not None:
        accepted.append(step(kind(rule["above"]), True))
        refused.append((kind(rule["above"]), f"greater than {rule['above']:g}"))
    if rule["high"] is not None:
        accepted.append(kind(rule["high"]))
        refused.append((step(kind(rule["high"]), True), f"at most {rule['high']:g}"))
    for value in accepted:
        if (path, value) not in CONTRADICTS:
            assert leaf(build(path, value), path) == value
    for value, message in refused:
        assert message in error_of(path, value)


def step_float(value, up):
    if value == 0 and up:
        return 2.0**-126  # the smallest number that float32 has in full precision
    return math.nextafter(value, math.inf if up else -math.inf)


def test_values_that_only_other_settings_refuse():
    for path, value in CONTRADICTS:
        error_of(path, value)


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, field, _ in LEAVES if field.metadata["choices"]]
)
def test_choices(path, field):
    choices = list(field.metadata["choices"])
    for choice in choices:
        assert leaf(build(path, choice), path) == choice
    message = error_of(path, choices[0] + "x")
    assert f"did you mean {choices[0]!r}?" in message


WRONG = {int: ["1", 1.0, True, None, [1]], float: ["1", True, None], str: [1, None], bool: [1, "x"]}


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, field, _ in LEAVES])
def test_wrong_types(path, field):
    for value in WRONG[field.type]:
        assert f"must be of type {field.type.__name__}" in error_of(path, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(value):
    for path, field in NUMBERS:
        if field.type is float:
            error_of(path, value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optimizer.learning_rate", 1e39, "is no number in float32"),
        ("optimizer.learning_rate", 10**400, "must be of type float"),
        ("optimizer.epsilon", 1e-39, "is no number in float32"),
        ("train.steps", 2**31, "which 32 bits hold"),
        ("data.directory", "a\0b", "holds a NUL"),
        ("evaluation.prompt", "\ud800", "lone surrogate"),
    ],
)
def test_values_that_would_become_others(path, value, message):
    assert message in error_of(path, value)


def test_a_whole_number_does_for_a_float():
    built = build("optimizer.clip_norm", 2)
    assert built.optimizer.clip_norm == 2.0
    assert type(built.optimizer.clip_norm) is float


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.num_layer", "model.num_layers"),
        ("model.moe.topp", "model.moe.top_p"),
        ("model.top_p", "model.moe.top_p"),
        ("moe", "model.moe"),
        ("num_experts", "model.moe.num_experts"),
        ("optimizer.learning_rte", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("train.batchsize", "train.batch_size"),
        ("optimiser", "optimizer"),
        ("data.source", "data.sources"),
        ("sead", "seed"),
        ("kept", "checkpoint.keep"),
    ],
)
def test_unknown_names_get_the_nearest(wrong, right):
    message = error_of(wrong, 1)
    assert message == f"config.{wrong} does not exist; did you mean config.{right}?"


def test_a_group_is_not_a_value():
    assert "must be a group of settings" in error_of("model", 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.num_heads": 6, "model.num_kv_heads": 4}, "num_kv_heads=4 must divide"),
        ({"model.head_width": 5}, "head_width=5 must be even"),
        ({"model.moe.saved_rows_per_token": -0.5}, "=-0.5 must be at least 0 rows/token, or auto"),
        ({"model.num_layers": 6, "model.moe.every_n_layers": 4}, "every_n_layers=4 must divide"),
        (
            {"model.moe.router": "top_k", "model.moe.top_k.k": 9, "model.moe.num_experts": 8},
            "top_k.k=9 must be at most config.model.moe.num_experts=8",
        ),
        ({"data.seq_len": 4096}, "seq_len=4096 must be at most config.model.max_seq_len=2048"),
        ({"train.batch_size": 10, "train.microbatches": 4}, "microbatches=4 must divide"),
        ({"mesh.expert": 0}, "mesh.expert=0 must be at least 1"),
        ({"mesh.model": -1}, "mesh.data=-1 and config.mesh.model=-1 cannot both"),
        ({"mesh.data": 0}, "mesh.data=0 must be at least 1"),
        ({"checkpoint.every_steps": 0}, "would save nothing before the end"),
        ({"checkpoint.keep_every_steps": 1500}, "keep_every_steps=1500 must be a multiple of"),
        ({"checkpoint.keep_best": 1}, "keep_best=1 needs held-out losses to compare"),
    ],
)
def test_settings_that_contradict_each_other(values, message):
    with pytest.raises(config.ConfigError, match=message) as caught:
        config.from_config_dict(nested(values))
    assert "\n" not in str(caught.value)


def test_a_dense_model_may_have_any_depth():
    built = config.from_config_dict(nested({"model.num_layers": 7, "model.moe.every_n_layers": 0}))
    assert built.model.moe.every_n_layers == 0


def test_round_trip_through_a_config_dict():
    original = config.from_config_dict(
        nested({"model.moe.top_p.threshold": 0.25, "seed": 7, "data.sources": "text:*.txt"})
    )
    edited = config.to_config_dict(original)
    assert isinstance(edited, ml_collections.ConfigDict)
    assert config.from_config_dict(edited) == original
    edited.model.moe.top_p.threshold = 0.5
    changed = config.from_config_dict(edited)
    assert changed.model.moe.top_p.threshold == 0.5
    assert original.model.moe.top_p.threshold == 0.25
    saved = json.loads(json.dumps(config.to_dict(changed)))
    assert config.from_config_dict(saved) == changed


def test_differences():
    assert config.differences(config.Config()) == []
    changed = config.from_config_dict(nested({"model.moe.top_p.threshold": 0.25, "train.steps": 5}))
    assert config.differences(changed) == [
        ("model.moe.top_p.threshold", 0.25, 0.4),
        ("train.steps", 5, 1000),
    ]


def test_auto_is_written_as_auto():
    changed = config.from_config_dict(nested({"loss.entropy.weight": 0.0}))
    assert config.differences(changed) == [("loss.entropy.weight", 0.0, "auto")]


def test_a_group_is_given_as_a_mapping():
    moe = config.MoE(router="top_k", top_k={"k": 3})
    assert (moe.top_k.k, moe.top_k.renormalize) == (3, False)
    again = dataclasses.replace(moe, top_k={"k": 1})
    assert again.top_k.k == 1
    assert moe.top_k.k == 3


def test_the_same_kinds_give_the_same_classes():
    """Or settings would differ from equal ones, and every function of them compile again."""
    assert config.MoE is config.MoE
    assert type(config.Config().model) is config.Model
    assert config.Config() == config.Config(model=config.Model(moe=config.MoE()))


def test_a_dataclass_is_checked_as_well():
    with pytest.raises(config.ConfigError, match="at least 1"):
        config.Config(train=config.Train(steps=0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().seed = 1


NAMES = st.one_of(
    st.sampled_from([path for path, _, _ in LEAVES]),
    st.sampled_from(["model", "model.moe", "train", "data"]),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.from_regex(r"(model|train|data)\.(moe\.)?[a-z_]{1,12}", fullmatch=True),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=4) | st.integers(), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(name=NAMES, value=VALUES)
def test_any_input_is_accepted_or_refused_in_one_sentence(name, value):
    message = "."
    try:
        config.from_config_dict(nested({name: value}))
    except config.ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert message[-1] in ".?"


IDLE = [
    ({}, "top_p.proportional_gain", 0.1, "top_p.budget_rule to proportional_integral"),
    ({"model.moe.top_p.experts_per_token": 1.5}, "top_p.integral_gain", 0.1, "budget_rule"),
    ({}, "top_p.budget_rule", "proportional_integral", "top_p.experts_per_token"),
    ({}, "top_p.max_threshold", 0.9, "top_p.experts_per_token"),
    ({}, "top_p.logit_scale", 2.0, "top_p.normalize_logits"),
    ({"model.moe.router": "top_k"}, "top_k.second_threshold", 0.5, "second to threshold or random"),
    (
        {"model.moe.router": "sigmoid_bias", "model.moe.sigmoid_bias.update_rule": "quantile"},
        "sigmoid_bias.rate",
        0.1,
        "update_rule to sign or proportional",
    ),
]


@pytest.mark.parametrize(("others", "name", "value", "remedy"), IDLE)
def test_a_setting_without_effect_is_refused_and_forgotten_of_a_stored_run(
    others, name, value, remedy
):
    path = f"model.moe.{name}"
    with pytest.raises(config.ConfigError) as caught:
        config.from_config_dict(nested(others | {path: value}))
    message = str(caught.value)
    assert message.startswith(f"config.{path}={value} has no effect while config.model.moe.")
    assert remedy in message
    stored = config.from_stored(nested(others | {path: value}))
    assert stored == config.from_config_dict(nested(others))
    with pytest.raises(config.ConfigError, match="has no effect"):
        config.with_free_settings(stored, {"model.moe.top_p.proportional_gain": "0.1"})
    assert leaf(build(path, value), path) == value


def test_what_a_setting_needs_is_in_its_group_and_the_same_in_all_layers():
    for path, field, _ in LEAVES:
        group = path.rpartition(".")[0]
        for other, wanted in field.metadata["only_with"].items():
            needed = {p: f for p, f, _ in LEAVES}[f"{group}.{other}"].metadata
            assert not needed["per_layer"]
            assert not needed["choices"] or set(wanted) < set(needed["choices"])
