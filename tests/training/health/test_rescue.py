"""Runs whose numbers go bad: they stop and can be replayed, or go back and around."""

import dataclasses
import os
import re
import shutil
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import command_line, config
from dynmoe_jax.data import TrainStream
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.training import feed, start, step, trainer
from dynmoe_jax.training.health import anomalies, rescue
from dynmoe_jax.training.health import replay as replay_command
from dynmoe_jax.training.health.replay import replay
from dynmoe_jax.training.health.rescue import BadNumbers
from dynmoe_jax.training.health.skips import Skip, read_skips
from dynmoe_jax.training.interrupt import StopRequest
from dynmoe_jax.training.run import Run
from dynmoe_jax.training.trainer import train

pytestmark = pytest.mark.slow

BOS = 1
JUMPS_AT = range(44, 47)


@pytest.fixture(scope="module")
def cfg(settings, change):
    cfg = change(settings, model__moe__backend="reference", train__max_skipped_in_a_row=3)
    return change(cfg, train__spike_steps=2, checkpoint__every_steps=4, checkpoint__keep=3)


def poison(monkeypatch, token):
    """The embedding of a token is NaN from the start."""

    def init_state(*arguments):
        state = step.init_state(*arguments)
        embedding = state.params["embedding_VD"]
        embedding[...] = embedding[...].at[token].set(jnp.nan)
        return state

    monkeypatch.setattr(start, "init_state", init_state)


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir)}


@pytest.fixture(scope="module")
def stopped(cfg, tmp_path_factory):
    """A run in which every sequence is bad, and the error that it ended with."""
    workdir = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, BOS)
        with pytest.raises(BadNumbers) as caught:
            train(cfg, workdir)
    return workdir, caught.value


def test_run_stops_after_so_many_in_a_row_with_a_sentence(stopped):
    workdir, error = stopped
    assert "not finite in 3 steps in a row, the last of them step 3;" in str(error)
    assert f"python -m dynmoe_jax.training.health.replay --workdir={workdir}" in str(error)
    assert "\n" not in str(error)
    lines = read_metrics(workdir)
    assert [line["skipped_updates"] for line in lines[:3]] == [1, 2, 3]
    assert np.isnan(lines[0]["loss"])


def test_error_becomes_its_own_exit_code(stopped, monkeypatch, capsys):
    def main():
        raise stopped[1]

    code = command_line.exit_code(main, trainer.BAD_INPUT)
    assert code == command_line.EXIT_BAD_NUMBERS not in (0, command_line.EXIT_BAD_INPUT)
    assert "error: The loss or the gradient" in capsys.readouterr().out


def test_replay_finds_what_was_poisoned(stopped, capsys):
    first, *_ = replay(stopped[0])
    assert (first.name, first.bad) == ("parameter embedding_VD", 16)
    printed = capsys.readouterr().out
    assert "not finite before this step: parameter embedding_VD." in printed
    assert "The loss is not finite in" in printed


def test_replay_is_a_command_and_refuses_what_is_not_there(stopped, monkeypatch, capsys, tmp_path):
    workdir = stopped[0]
    for arguments, code, sentence in (
        ([f"--workdir={workdir}", "--step=3"], 0, "Step 3 of"),
        ([f"--workdir={workdir}", "--step=7"], 2, "choose from 3."),
        ([f"--workdir={tmp_path}"], 2, "holds no step that failed"),
    ):
        monkeypatch.setattr(sys, "argv", ["replay", *arguments])
        assert replay_command.main() == code
        assert sentence in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["settings", "arrays"])
def test_damaged_replay_is_refused_in_one_sentence(stopped, tmp_path, damage):
    kept = shutil.copytree(stopped[0] / rescue.FOLDER, tmp_path / rescue.FOLDER) / "3"
    if damage == "settings":
        (kept / rescue.SETTINGS).write_text("{", encoding="utf-8")
    else:
        shutil.rmtree(kept / rescue.ARRAYS)
    with pytest.raises(config.ConfigError, match="cannot be read") as caught:
        replay(tmp_path)
    assert "\n" not in str(caught.value)


def test_stopped_run_is_not_stuck(cfg, change, tmp_path, monkeypatch):
    """Continued when the cause is gone, it trains: the streak in its checkpoint is forgiven."""

    def init_state(*arguments):
        state = step.init_state(*arguments)
        guard = dataclasses.replace(state.guard, skipped_in_a_row=jnp.int32(5))
        return dataclasses.replace(state, guard=guard)

    with monkeypatch.context() as patch:
        patch.setattr(start, "init_state", init_state)
        patch.setattr(trainer, "rescue", lambda *_: None)
        assert train(change(cfg, train__steps=4), tmp_path) == 0
    assert [line["skipped_in_a_row"] for line in read_metrics(tmp_path)] == [6, 7, 8, 9]
    assert train(cfg, tmp_path) == 0
    assert [line["skipped_in_a_row"] for line in read_metrics(tmp_path)][4:] == [0, 0]


def test_single_bad_batches_are_skipped_and_the_run_completes(cfg, change, tmp_path, monkeypatch):
    """With replay of the whole: forward is bad in the sequences with the token, and no other."""
    token = _token_of_some_batches(cfg, tmp_path)
    poison(monkeypatch, token)
    cfg = change(cfg, train__steps=8, train__max_skipped_in_a_row=8)
    assert train(cfg, tmp_path / "run") == 0
    by_step = losses(tmp_path / "run")
    bad = [number for number, loss in by_step.items() if np.isnan(loss)]
    assert 0 < len(bad) < 8
    assert read_metrics(tmp_path / "run")[-1]["skipped_updates"] == len(bad)


def _token_of_some_batches(cfg, folder):
    """A token that about half of the batches hold."""
    prepared, tokenizer = trainer.load_text(cfg, folder / "look", position=None)
    with TrainStream(prepared, tokenizer, cfg.data, cfg.train.batch_size, cfg.seed) as stream:
        seen = [np.unique(next(stream)["tokens"]) for _ in range(8)]
    counts = np.bincount(np.concatenate(seen), minlength=tokenizer.vocab_size)
    return int(np.argmin(np.abs(counts - 4)))


class JumpingStream(TrainStream):
    """A stream whose batches of some numbers have targets that nobody could expect."""

    number = 0

    def __next__(self):
        batch = super().__next__()
        self.number += 1
        if self.number in JUMPS_AT:
            batch = {**batch, "targets": np.full_like(batch["targets"], 250)}
        return batch

    def get_state(self):
        return {**super().get_state(), "number": self.number}

    def set_state(self, state):
        super().set_state(state)
        self.number = state["number"]


@pytest.fixture(scope="module")
def rolled_back(cfg, change, tmp_path_factory):
    """A run whose loss jumps at step 44, and what it said."""
    workdir = tmp_path_factory.mktemp("runs") / "spike"
    cfg = change(cfg, train__steps=50, train__spike_action="rollback", checkpoint__keep=100)
    with pytest.MonkeyPatch.context() as monkeypatch:
        said = []
        monkeypatch.setattr(feed, "TrainStream", JumpingStream)
        monkeypatch.setattr(trainer, "warn", said.append)
        assert train(cfg, workdir) == 0
    return cfg, workdir, said


def test_spike_is_gone_around(rolled_back):
    _, workdir, said = rolled_back
    # Two high losses, at 44 and 45, make it known; the update before them, 43, is undone as well.
    # The third bad batch is met again after the rollback and is too few for another one.
    assert read_skips(workdir) == [Skip(first=43, last=45, spike_step=44, resumed_step=40)]
    assert said == ["back to step 40; the batches 43 to 45 are left out."]
    by_step = losses(workdir)
    assert [line["step"] for line in read_metrics(workdir)] == list(range(1, 51))
    quiet = max(loss for number, loss in by_step.items() if 30 <= number != 43)
    assert by_step[43] > quiet + 1  # batch 46, the one left
    kept = {path.name for path in (workdir / FOLDER).iterdir()}
    assert {"40", "44", "48", "50"} <= kept


def test_run_after_a_rollback_is_reproduced_by_a_resume(rolled_back, tmp_path, monkeypatch):
    cfg, workdir, _ = rolled_back
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for number in (44, 48, 50):
        shutil.rmtree(copy / FOLDER / str(number))
    (copy / "summary.json").unlink()
    monkeypatch.setattr(feed, "TrainStream", JumpingStream)
    assert train(cfg, copy) == 0
    assert losses(copy) == losses(workdir)


@pytest.mark.parametrize(
    "moment", ["as the spike is seen", pytest.param("while going back", marks=pytest.mark.long)]
)
def test_signal_and_rollback_are_both_obeyed(rolled_back, tmp_path, monkeypatch, capsys, moment):
    cfg, workdir, _ = rolled_back
    copy = shutil.copytree(workdir, tmp_path / "copy")
    for path in ("44", "48", "50"):
        shutil.rmtree(copy / FOLDER / path)
    for name in ("summary.json", "skipped_batches.json"):
        (copy / name).unlink()
    monkeypatch.setattr(feed, "TrainStream", JumpingStream)
    place, name = {
        "as the spike is seen": (anomalies.AnomalyWatch, "_spiked"),
        "while going back": (rescue, "write_skips"),
    }[moment]
    original = getattr(place, name)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, interrupted)
        assert train(cfg, copy) == command_line.EXIT_PREEMPTED
    assert "Stopped there; the same command continues." in capsys.readouterr().out
    assert max(int(path.name) for path in (copy / FOLDER).iterdir()) == 40
    assert train(cfg, copy) == 0
    assert losses(copy) == losses(workdir)


def run_with(cfg, workdir, checkpoints):
    """A run of which rescue needs no more than this."""
    return Run(cfg, workdir, None, None, checkpoints, StopRequest(), None, cfg)


def test_spike_without_an_older_checkpoint_is_a_warning(cfg, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(rescue, "warn", said.append)

    class Empty:
        def wait(self):
            pass

        def steps(self):
            return [44]

    spike = rescue.Spike(44, 45)
    rescue.rescue(spike, run_with(cfg, tmp_path, Empty()), None)
    assert re.fullmatch(r"no checkpoint is older than the spike at step 44, so .*", said[0])
    assert read_skips(tmp_path) == []


def test_loss_that_jumps_however_often_one_goes_back_stops_the_run(cfg, tmp_path):
    class One:
        deleted = ()

        def wait(self):
            pass

        def steps(self):
            return [40, 44]

        def delete_after(self, step):
            self.deleted = (*self.deleted, step)

    checkpoints = One()
    run = run_with(cfg, tmp_path, checkpoints)
    for number in range(rescue.MOST_ROLLBACKS):
        with pytest.raises(rescue.RolledBack):
            rescue.rescue(rescue.Spike(44, 45), run, None)
        # The steps 43 to 45 are other batches each time.
        assert read_skips(tmp_path)[number].first == 43 + 3 * number
    with pytest.raises(BadNumbers, match=r"after 3 rollbacks to step 40; .*learning_rate"):
        rescue.rescue(rescue.Spike(44, 45), run, None)
    assert checkpoints.deleted == (40, 40, 40)
