"""Estimate of how long a study takes."""

import pytest

from dynmoe_jax import config
from dynmoe_jax.study.running.estimate import Costs, Timing, models_to_time, time_steps


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


def test_steps_on_text_that_is_corrupted_can_be_timed():
    cfg = config.from_config_dict(
        {
            "model": {
                "num_layers": 1,
                "width": 8,
                "num_heads": 1,
                "num_kv_heads": 1,
                "head_width": 8,
                "hidden_width": 8,
                "vocab_size": 512,
                "max_seq_len": 16,
                "moe": {"every_n_layers": 0},
            },
            "data": {"corruption": "ul2", "seq_len": 16},
            "train": {"batch_size": 8, "steps": 4},
        }
    )
    assert time_steps(cfg)["step"] > 0
