"""Sizes and models of the study: what they share and what tells them apart."""

import importlib

import pytest

from dynmoe_jax import config
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.study.comparison.models import BUDGET, MODELS, changed
from dynmoe_jax.study.comparison.plan import Arm, Request, arms_of
from dynmoe_jax.study.comparison.sizes import SIZES


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("dense_374m", "dense"),
        ("dense_570m", "wide_dense"),
        ("moe_top1", "top_1"),
        ("moe_top2", "top_2"),
        ("moe_dynamic", "dynamic"),
    ],
)
def test_paper_models_are_those_of_the_config_files(file, model):
    size = SIZES["paper"]
    module = importlib.import_module(f"configs.paper.{file}")
    theirs = config.from_config_dict(module.get_config())
    assert MODELS[model].settings(size.shared(), size.wider) == theirs


@pytest.mark.parametrize("size", ["tiny", "laptop", "gpu"])
def test_dense_models_match_one_and_two_experts(size):
    size = SIZES[size]
    model_of = lambda name: MODELS[name].settings(size.shared(), size.wider).model  # noqa: E731
    routers = model_of("top_1").num_moe_layers * model_of("top_1").width
    routers *= model_of("top_1").moe.num_experts
    for dense, experts in (("dense", 1), ("wide_dense", 2)):
        used = active_parameters(model_of("top_2"), experts)
        assert count_parameters(model_of(dense)) == used - routers


def test_gpu_size_has_a_hundred_million_active_parameters():
    size = SIZES["gpu"]
    assert active_parameters(MODELS["top_1"].settings(size.shared(), size.wider).model, 1) >= 1e8


def test_models_differ_in_nothing_but_what_they_say(tmp_path):
    asked = Request("tiny", tmp_path, 1)
    base = dict(_leaves(asked.base))
    for name in asked.all_models:
        model = MODELS[name]
        if model.budget_of:
            continue
        arm = dict(_leaves(Arm(name, 0).settings(asked)))
        said = set(model.changes) | (set(asked.of_size.wider) if model.widened else set())
        differ = {path for path in base if arm[path] != base[path]}
        assert differ <= said | ({"train.steps"} if model.ablation else set())


def _leaves(cfg):
    return [(path, value) for path, _, value in config.walk(cfg)]


def test_what_a_run_needs_comes_before_it(tmp_path):
    asked = Request("tiny", tmp_path, 2, ("dynamic_budget", "dense"), learning_rates=(0.1, 0.2))
    arms = arms_of(asked)
    for number, arm in enumerate(arms):
        assert set(arm.needs(asked)) <= set(arms[:number])
    assert Arm("dynamic", 1) in arms
    assert len(set(arms)) == len(arms)


def test_questions_without_ablations_train_none(tmp_path):
    asked = Request("laptop", tmp_path, 3, questions=(1, 2))
    assert not [arm for arm in arms_of(asked) if MODELS[arm.model].ablation]


def test_changed_refuses_what_cannot_be():
    base = SIZES["tiny"].shared()
    with pytest.raises(config.ConfigError, match="experts_per_token"):
        changed(base, {BUDGET: 100.0})
