"""Freeze masks: what is outside stays bit for bit, what is inside moves and alone has moments."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.config.parameter_groups import GROUPS
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.training.trainable import split_trainable
from tests.training.test_router_states import Forgetful, batch, parts, settings

STEPS = 20
MOE = {
    "router": "sigmoid_bias",
    "sigmoid_bias": {"k": 2, "rate": 0.01},
    "shared_hidden_width": 8,
    "shared_gate": True,
    "every_n_layers": 2,
}


def group(path):
    """The group of a parameter, written down by hand."""
    name = path[-1]
    by_name = {
        "router_DE": "router",
        "shared_router_D1": "router",
        "gate_up_ED2F": "experts",
        "down_EFD": "experts",
        "scale": "norms",
        "embedding_VD": "vocabulary",
        "head_DV": "vocabulary",
    }
    return by_name.get(name, "attention" if "attention" in path else "dense")


@functools.cache
def trained(trainable, steps=STEPS):
    """(variables before, after, numbers with a moment) of a model whose every group has some."""
    cfg = settings(MOE, trainable=trainable)
    init, step = parts(cfg)
    before = after = init(jax.random.key(0))
    for _ in range(steps):
        after, _ = step(after, batch())
    as_arrays = lambda state: {p: np.asarray(v[...]) for p, v in state.params.flat_state()}  # noqa: E731
    moments = sum(x.size for x in jax.tree.leaves(after.optimizer) if x.ndim) // 2
    return as_arrays(before), as_arrays(after), moments


@pytest.mark.parametrize(
    ("trainable", "inside"),
    [
        ("experts", {"experts"}),
        ("not:experts", {"router", "dense", "attention", "norms", "vocabulary"}),
        ("not:router", {"experts", "dense", "attention", "norms", "vocabulary"}),
        ("not:router, experts", {"dense", "attention", "norms", "vocabulary"}),
    ],
)
def test_what_is_frozen_is_bit_identical_after_twenty_steps(trainable, inside):
    before, after, moments = trained(trainable)
    parameters = [path for path in before if path[-1] != "bias_E"]
    assert {group(path) for path in parameters} == set(GROUPS)
    for path in parameters:
        same = np.array_equal(before[path], after[path])
        assert same == (group(path) not in inside), path
    assert moments == sum(before[path].size for path in parameters if group(path) in inside)


@pytest.mark.parametrize(("trainable", "moves"), [("not:router", False), ("not:experts", True)])
def test_the_state_of_a_frozen_router_stays(trainable, moves):
    before, after, _ = trained(trainable)
    states = [path for path in before if path[-1] == "bias_E"]
    assert states
    for path in states:
        assert np.array_equal(before[path], after[path]) != moves


def test_a_frozen_router_does_not_revise_its_parameters():
    with ROUTERS.temporarily("forgetful", Forgetful):
        cfg = settings({"router": "forgetful", "forgetful": {"k": 2}}, trainable="not:router")
        init, step = parts(cfg)
        before = init(jax.random.key(0))
        after, _ = step(before, batch())
        for state in (before, after):
            routers = [v[...] for p, v in state.params.flat_state() if p[-1] == "router_DE"]
            assert all(np.any(router) for router in routers)


@pytest.mark.parametrize("trainable", ["not:nothing_like_this", "rooter", "("])
def test_what_finds_nothing_is_refused(trainable):
    """Behind "not:" too: a misspelled name would freeze nothing."""
    cfg = settings(MOE, trainable=trainable)
    with pytest.raises(config.ConfigError, match=r"config\.train\.trainable="):
        split_trainable(variable_shapes(cfg.model), cfg)


def test_a_dense_model_has_no_router_and_everything_cannot_be_frozen():
    dense = settings(MOE, trainable="router")
    model = dataclasses.replace(dense.model, moe=config.MoE(every_n_layers=0))
    dense = dataclasses.replace(dense, model=model)
    with pytest.raises(config.ConfigError, match="finds no parameter"):
        split_trainable(variable_shapes(model), dense)
    none = settings(MOE, trainable=f"not:{','.join(GROUPS)}")
    with pytest.raises(config.ConfigError, match="leaves no parameter to train"):
        split_trainable(variable_shapes(none.model), none)
