"""A whole run of layers whose routers look at sequences, at batches and at the past."""

import dataclasses
import os
import signal

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training import trainer

pytestmark = pytest.mark.slow

STEPS, STOP = 5, 3


@pytest.fixture(scope="module")
def runs(settings, change, traced_once, tmp_path_factory):
    """A run that was stopped and continued, and one that never stopped."""
    moe = config.MoE(
        num_experts=4,
        hidden_width=16,
        router="seq_top_k",
        allow_non_causal=True,
        seq_top_k={"k": 1, "extra": 1},
        expert_threshold={"warmup_steps": 2, "decay": 0.8},
        # Places are emptied and filled after steps 2 and 5.
        top_any={"wait": 1, "window": 1, "rest": 1, "initial_experts": 3},
    )
    model = dataclasses.replace(
        settings.model,
        moe=moe,
        num_layers=3,
        layers="1:moe.router=expert_threshold;2:moe.router=top_any",
        kernels="plain",
    )
    cfg = change(settings, model=model, train__steps=STEPS)
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:

        class Interrupted(trainer.PendingStep):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                if self.number == STOP:
                    os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(trainer, "PendingStep", Interrupted)
        assert trainer.train(cfg, folder / "stopped") == EXIT_INTERRUPTED
    assert trainer.train(cfg, folder / "stopped") == 0
    assert trainer.train(cfg, folder / "whole") == 0
    return folder / "stopped", folder / "whole"


def test_a_stopped_run_goes_on_bit_for_bit(runs, saved_state):
    stopped, whole = (saved_state(folder, STEPS) for folder in runs)
    moving = [path for path in whole if "cut_E" in path or "live_E" in path or "routed_E" in path]
    assert len(moving) == 3
    for path, array in whole.items():
        np.testing.assert_array_equal(stopped[path], array, err_msg=path)
    assert [line["loss"] for line in read_metrics(runs[0])] == [
        line["loss"] for line in read_metrics(runs[1])
    ]


def test_metrics_show_the_states_and_rows_are_those_of_the_budget(runs):
    lines = read_metrics(runs[1])
    assert all(line["experts_per_token_by_layer"][0] == 1 for line in lines)
    assert len({line["router_cut"] for line in lines}) == STEPS
    assert all(2 <= line["router_live_experts"] <= 4 for line in lines)
    summary = read_summary(runs[1])
    assert np.isfinite(summary.heldout.loss)
