"""Estimate of how long a study takes."""

import pytest

from dynmoe_jax.study.running.estimate import Costs, Timing, models_to_time


def test_a_step_lies_on_the_line_through_those_that_were_timed():
    costs = Costs([Timing(1.0, 0.3, 2e9), Timing(1.0, 0.2, 1e9)])
    assert costs.step(3e9) == pytest.approx(0.4)


def test_chance_in_steps_of_nearly_as_many_flops_makes_no_slope():
    costs = Costs([Timing(1.0, 0.20, 1e9), Timing(1.0, 0.25, 1.01e9)])
    assert costs.step(2e9) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("models", "timed"),
    [
        (("top_2", "dense", "dynamic"), ("top_2", "dense")),
        (("dynamic", "dense"), ("dense", "dynamic")),
        (("dynamic", "dynamic_no_entropy"), ("dynamic", "dynamic_no_entropy")),
        (("dynamic",), ("dynamic",)),
    ],
)
def test_only_models_that_are_trained_are_timed(models, timed):
    """What is compiled for the estimate is compiled for training too."""
    assert models_to_time(models, ("dense", "top_2")) == timed
