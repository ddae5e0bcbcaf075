"""A run whose router looks at later tokens: trains, stops, goes on, reports, and writes nothing."""

import dataclasses
import os
import signal
import sys

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.evaluation import __main__ as evaluation
from dynmoe_jax.inference import __main__ as inference
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training import trainer
from dynmoe_jax.training.interrupt import EXIT_INTERRUPTED
from dynmoe_jax.training.trainer import train

pytestmark = pytest.mark.slow

STEPS = 4


def settings_of(settings, **moe):
    """The small run with soft slots, noise on them, and layers that compute with padding."""
    moe = config.MoE(num_experts=4, hidden_width=16, allow_non_causal=True, **moe)
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, moe=moe, kernels="plain"),
        train=config.Train(steps=STEPS, batch_size=8, log_every_steps=1),
    )


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    """(settings, folder) of a run that was never stopped."""
    cfg = settings_of(settings, router="sphero", sphero={"slots": 3})
    folder = tmp_path_factory.mktemp("soft")
    assert train(cfg, folder) == 0
    return cfg, folder


def test_metrics_summary_and_report_are_complete(run):
    cfg, folder = run
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert all(line["unused_experts"] == line["rows_dropped"] == 0 for line in lines)
    # Rows that are computed: three slots of four experts for each sequence of 32 tokens.
    assert all(abs(line["experts_per_token"] - 12 / 32) < 0.05 for line in lines)
    summary = read_summary(folder)
    assert summary.complete
    assert np.isfinite(summary.heldout.loss)
    assert summary.sample is None
    assert summary.left_out == dict.fromkeys(
        ("sample", "generation", "evaluation"), cfg.model.looks_ahead
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "looks at later tokens: the model cannot write text" in page
    assert "<h2>Sample</h2>" not in page
    assert "soft spherical, 3 slots" in page


@pytest.mark.parametrize("stopped", [2])
def test_stopped_and_continued_it_is_the_run_that_never_stopped(
    run, stopped, tmp_path, saved_state, monkeypatch
):
    cfg, whole = run

    class Interrupted(trainer.PendingStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if self.number == stopped:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PendingStep", Interrupted)
        assert train(cfg, tmp_path) == EXIT_INTERRUPTED
    assert len(read_metrics(tmp_path)) == stopped
    assert train(cfg, tmp_path) == 0
    states = saved_state(whole, STEPS), saved_state(tmp_path, STEPS)
    assert states[0].keys() == states[1].keys()
    assert any("log_dispatch" in path for path in states[0])
    for path, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][path], err_msg=path)
    assert read_summary(tmp_path).heldout == read_summary(whole).heldout


def test_it_opens_and_the_commands_that_need_more_are_refused_in_a_sentence(
    run, monkeypatch, capsys
):
    cfg, folder = run
    assert load_run(folder)[0].model == cfg.model
    for command, flag in ((inference, "--prompt=a"), (evaluation, f"--perplexity=text:{__file__}")):
        monkeypatch.setattr(sys, "argv", ["command", f"--workdir={folder}", flag])
        assert command.main() == 2
        said = capsys.readouterr().out
        assert "looks at later tokens: the model cannot write text" in said.replace("\n", " ")


def test_experts_that_choose_train_and_are_reported(settings, tmp_path):
    cfg = settings_of(settings, router="expert_choice", expert_choice={"experts_per_token": 2.0})
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2))
    assert train(cfg, tmp_path) == 0
    summary = read_summary(tmp_path)
    assert summary.left_out
    assert summary.heldout.experts_per_token == pytest.approx(2.0, abs=0.2)
    for load in summary.heldout.load_by_layer:
        assert max(load) == pytest.approx(min(load))


def test_a_transform_that_looks_ahead_is_left_out_of_what_is_written(
    settings, tmp_path, monkeypatch, capsys
):
    cfg = settings_of(settings, transforms="row_budget", row_budget={"rows_per_token": 1.5})
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2))
    assert train(cfg, tmp_path) == 0
    summary = read_summary(tmp_path)
    assert summary.sample.text
    assert not summary.left_out
    asked = [f"--workdir={tmp_path}", "--prompt=a", "--max_tokens=2"]
    monkeypatch.setattr(sys, "argv", ["command", *asked])
    assert inference.main() == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "later tokens (config.model.moe.transforms='row_budget'); here none are dropped" in said
