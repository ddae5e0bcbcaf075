"""Settings of a stored run that may be changed when it is opened."""

from types import SimpleNamespace

import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import free_settings
from dynmoe_jax.inference.arguments import parse
from dynmoe_jax.inference.generate import Generator


def run_of(**moe):
    return config.Config(model=config.Model(moe=config.MoE(num_experts=4, **moe)))


def test_what_is_no_part_of_the_model_is_changed():
    changes = {"model.moe.dense.k": "2", "model.moe.backend": "reference", "model.kernels": "plain"}
    cfg = config.with_free_settings(run_of(router="dense"), changes)
    moe = cfg.model.moe
    assert (moe.route.k, moe.backend, cfg.model.kernels) == (2, "reference", "plain")
    assert config.with_free_settings(cfg, {"model.moe.dense.k": "0"}).model.moe.route.k == 0
    assert config.with_free_settings(cfg, {}) is cfg


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "model.moe.num_experts=8",
            "cannot be said of a run that is stored, because it is part of",
        ),
        ("train.steps=8", "because it is of training; leave it out"),
        ("model.moe.dense.q=8", r"config\.model\.moe\.dense\.q does not exist; did you mean"),
        ("model.moe.dense.k=5", "k=5 must be at most config.model.moe.num_experts=4"),
        ("model.moe.dense.k=two", "k='two' must be of type int"),
        ("model.moe.dense.threshold=2", "threshold=2.0 must be at most 1"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(setting, message):
    changes, _ = free_settings([f"--config.{setting}"])
    with pytest.raises(config.ConfigError, match=message):
        config.with_free_settings(run_of(router="dense"), changes)


def test_a_setting_of_another_router_is_refused():
    with pytest.raises(config.ConfigError, match="dense"):
        config.with_free_settings(run_of(), {"model.moe.dense.k": "2"})


def test_the_command_lines_take_them():
    flags = ["--workdir=a", "--config.model.moe.dense.k=2", "--prompt=b", "--top_k=3"]
    asked = parse(flags, interactive=False)
    assert asked.settings == {"model.moe.dense.k": "2"}
    assert (asked.prompts, asked.sampling.top_k) == (["b"], 3)
    with pytest.raises(config.ConfigError, match=r"write --config\.model\.moe\.dense\.k=VALUE"):
        free_settings(["--config.model.moe.dense.k"])


def test_a_choice_that_names_less_forgets_the_settings_of_what_it_named():
    cfg = run_of(transforms="capacity,row_budget", capacity={"minimum": 1})
    assert "write with --config.model.moe.transforms=''" in cfg.model.cannot_write
    written = config.with_free_settings(cfg, {"model.moe.transforms": ""})
    assert written == run_of()
    changes = {"model.moe.transforms": "", "model.moe.capacity.minimum": "2"}
    with pytest.raises(config.ConfigError, match="does not name capacity"):
        config.with_free_settings(cfg, changes)


@pytest.mark.parametrize(
    ("moe", "rest"),
    [
        ({"transforms": "row_budget"}, "''"),
        ({"transforms": "capacity"}, "''"),
        ({"transforms": "capacity,row_budget", "capacity": {"priority": "token"}}, "'capacity'"),
    ],
)
def test_a_transform_that_looks_ahead_writes_nothing_and_says_with_what_it_would(moe, rest):
    model = run_of(**moe).model
    assert model.cannot_write.startswith("config.model.moe.transforms=")
    assert f"write with --config.model.moe.transforms={rest}," in model.cannot_write
    assert not model.looks_ahead
    with pytest.raises(config.ConfigError, match="for the sake of later ones"):
        Generator(SimpleNamespace(config=model))


def test_a_causal_transform_and_a_dense_model_write():
    by_token = {"transforms": "capacity", "capacity": {"priority": "token"}}
    assert not run_of(**by_token).model.cannot_write
    assert not run_of(transforms="row_budget", every_n_layers=0).model.cannot_write
