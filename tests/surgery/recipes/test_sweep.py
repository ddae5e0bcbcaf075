"""Efforts of one model are compared at equal FLOPs, and drawn."""

import math

import pytest

from dynmoe_jax import config
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.surgery.recipes import Efforts, Sweep, Train, sizes
from dynmoe_jax.surgery.recipes.steps.sweep import mean_difference


def test_lines_are_compared_over_the_flops_that_both_have():
    # From 2 to 3 FLOPs: 1 less 2 at 2, 0 less 1 at 3; what lies outside counts nowhere.
    assert mean_difference([(1, 9), (2, 1), (3, 0)], [(3, 1), (2, 2), (7, 50)]) == pytest.approx(-1)
    # Straight between neighbors: 0.5 more at 1, 0 more at 2.
    assert mean_difference([(0, 2), (2, 1)], [(1, 1), (2, 1)]) == pytest.approx(0.25)
    assert math.isnan(mean_difference([(0, 1), (1, 1)], [(2, 1), (3, 1)]))


def test_efforts_that_cannot_be_are_refused_before_anything_is_done():
    trained = Train("trained", sizes.dense("tiny", 0))
    wrong = Efforts("wrong", "model.width", (1, 2))
    with pytest.raises(config.ConfigError, match=r"config\.model\.width=1 cannot be said of a run"):
        Sweep("swept", trained, (wrong,)).price()
    with pytest.raises(config.ConfigError, match="swept has no efforts"):
        Sweep("swept", trained, ()).price()


def test_an_objective_that_a_model_refuses_is_left_behind():
    cfg = sizes.dense("tiny", 0, objective="sparsify")
    assert edited(cfg, {"model.num_layers": 3}).train.objective == "sparsify"
    split = edited(cfg, {"model.moe.every_n_layers": 1})
    assert split.train.objective == config.Train().objective
