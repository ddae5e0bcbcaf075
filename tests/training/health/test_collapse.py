"""When routing counts as collapsed: loads and steps by hand."""

import dataclasses

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.training.health.collapse import CollapseWatch

# Four experts and p = 0.6: at most floor(0.6 * 4) + 1 = 3 experts per token.
MOE = config.MoE(num_experts=4, top_p={"threshold": 0.6})
TOKENS = 100
EVEN = np.full((2, 4), 50)  # two experts per token


def watch(after=20, step=0, layers=2, **changes):
    model = config.Model(num_layers=layers, moe=dataclasses.replace(MOE, **changes))
    return CollapseWatch(config.Config(model=model, train=config.Train(collapse_steps=after)), step)


def looks(watch, steps, load_NE, tokens=TOKENS):
    return [warning for step in steps for warning in watch.look(step, np.array(load_NE), tokens)]


def test_unused_experts_are_named_once_after_so_many_steps():
    load = EVEN.copy()
    load[1] = [0, 100, 100, 0]
    watching = watch()
    assert looks(watching, (5, 10, 15), load) == []
    (warning,) = looks(watching, (20, 25, 30), load)
    assert warning.startswith("step 20: no token has chosen experts 0 of MoE layer 1, 3 of MoE la")
    assert "config.loss.balance.weight" in warning
    assert "config.model.moe.num_experts=4" in warning


def test_expert_that_is_chosen_now_and_then_is_used():
    unused, watching = EVEN.copy(), watch()
    unused[0] = [0, 50, 50, 100]
    for step in range(5, 100, 5):
        assert looks(watching, [step], EVEN if step % 20 == 15 else unused) == []


def test_run_that_continues_counts_from_where_it_begins():
    load = EVEN * [1, 1, 1, 0]
    assert looks(watch(step=1000), (1010,), load) == []
    assert looks(watch(step=1000), (1010, 1020), load)


def test_many_unused_experts_are_not_all_named():
    (warning,) = looks(watch(layers=3), [20], [[0, 0, 0, 200]] * 3)
    assert " and 4 more for at least 20 steps" in warning


@pytest.mark.parametrize(
    ("load", "found", "remedy"),
    [
        (
            [[75, 75, 75, 75]] * 2,
            "used 3.00 of at most 3 experts",
            "entropy.weight or config.optimiz",
        ),
        (
            [[25, 25, 25, 26]] * 2,
            "used 1.01 of at most 3 experts",
            "lower config.loss.entropy.weight",
        ),
    ],
)
def test_mean_at_either_end_is_said_once(load, found, remedy):
    watching = watch()
    assert looks(watching, (5, 15), load) == []
    (warning,) = looks(watching, (20, 25, 50), load)
    assert found in warning
    assert remedy in warning
    assert "config.model.moe.top_p.threshold=0.6" in warning


def test_one_step_away_from_the_end_begins_the_count_anew():
    watching, most = watch(), [[75, 75, 75, 75]] * 2
    assert looks(watching, (5, 15), most) == []
    assert looks(watching, (18,), EVEN) == []
    assert looks(watching, (20, 37), most) == []
    assert len(looks(watching, (38,), most)) == 1


@pytest.mark.parametrize(
    ("changes", "load"),
    [
        ({"router": "top_k", "top_p": {}}, EVEN),  # always as many
        ({"top_p": {"threshold": 0.2}}, [[25, 25, 25, 25]] * 2),  # floor(0.2 * 4) + 1: always one
        ({}, np.zeros((0, 1), np.int32)),  # a dense model
        ({}, EVEN),
    ],
)
def test_nothing_to_say(changes, load):
    assert looks(watch(**changes), range(0, 200, 5), load) == []


def test_no_warning_if_none_is_wanted_or_nothing_was_routed():
    load = [[0, 0, 0, 0]]
    assert looks(watch(after=0), range(0, 200, 5), load) == []
    assert looks(watch(), range(0, 200, 5), load, tokens=0) == []
