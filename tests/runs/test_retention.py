"""When checkpoints are written, and which ones stay."""

import datetime

import jax.numpy as jnp
import pytest

from dynmoe_jax import config
from dynmoe_jax.runs import checkpoint as checkpoint_module
from dynmoe_jax.runs.checkpoint import FOLDER, Checkpoints
from dynmoe_jax.runs.load import load_run

CLOCK = "orbax.checkpoint.checkpoint_manager.datetime.datetime"


@pytest.fixture
def run(settings, tmp_path):
    """Saves the steps (with their held-out losses) where due, and returns which are there."""

    def run(losses, **values):
        checkpoints = Checkpoints(tmp_path, config.Checkpoint(**values))
        for step, loss in losses.items():
            if checkpoints.due(step):
                checkpoints.save(step, {"x": jnp.zeros(3)}, {}, settings, loss)
                checkpoints.wait()  # by time, nothing is saved while another one is being
        best = checkpoints.best_step()
        checkpoints.close()
        folders = [path.name for path in (tmp_path / FOLDER).iterdir()]
        return sorted(map(int, folders)), best

    return run


def test_every_few_steps_and_the_newest(run):
    assert run(dict.fromkeys(range(1, 12)), every_steps=3, keep=2) == ([6, 9], None)


def test_the_best_are_kept_besides_the_newest(run):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 5.0, 7: None}
    assert run(losses, every_steps=1, keep=1, keep_best=2) == ([2, 3, 7], 2)


def test_one_of_so_many_steps_is_kept_for_good(run):
    steps = dict.fromkeys(range(1, 12))
    assert run(steps, every_steps=2, keep=1, keep_every_steps=4) == ([4, 8, 10], None)


class _Clock(datetime.datetime):
    """Shows so many minutes after a beginning."""

    minutes = 0

    @classmethod
    def now(cls, tz=None):
        return datetime.datetime(2026, 1, 1, tzinfo=tz) + datetime.timedelta(minutes=cls.minutes)


@pytest.fixture
def a_step_takes_30_minutes(monkeypatch):
    due = Checkpoints.due

    def at_its_time(checkpoints, step):
        _Clock.minutes = 30 * step
        return due(checkpoints, step)

    monkeypatch.setattr(CLOCK, _Clock)
    monkeypatch.setattr(Checkpoints, "due", at_its_time)


@pytest.mark.usefixtures("a_step_takes_30_minutes")
def test_one_of_so_many_hours_is_kept_for_good(run):
    kept, _ = run(dict.fromkeys(range(1, 12)), every_steps=1, keep=1, keep_every_hours=2.0)
    assert kept == [1, 5, 9, 11]


@pytest.mark.usefixtures("a_step_takes_30_minutes")
def test_every_few_minutes(run):
    saved, _ = run(dict.fromkeys(range(1, 10)), every_steps=0, every_minutes=80.0, keep=9)
    assert saved == [1, 4, 7]


def test_the_best_can_be_loaded(workdir, state, settings, tokenizer):
    position = {"row": 9, "tokenizer": tokenizer.fingerprint}
    checkpoints = Checkpoints(workdir, config.Checkpoint(keep=9))
    checkpoints.save(5, state, position, settings, 1.0)
    checkpoints.save(6, state, position, settings, 2.0)
    checkpoints.close()
    loaded = []
    read = checkpoint_module.Checkpoints.params

    def params(self, step, like):
        loaded.append(step)
        return read(self, step, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module.Checkpoints, "params", params)
        load_run(workdir)
        load_run(workdir, best=True)
    assert loaded == [6, 5]


@pytest.mark.parametrize(
    ("every_steps", "every_minutes", "clock", "due"),
    [
        (6, 0.0, True, [6, 12, 18, 24]),
        (0, 5.0, True, [10, 20]),  # only every tenth step do processes compare clocks
        (6, 5.0, True, [6, 10, 12, 18, 20, 24]),
        (6, 5.0, False, [6, 12, 18, 24]),
    ],
)
def test_several_processes_go_by_the_clock_of_the_first(
    tmp_path, monkeypatch, every_steps, every_minutes, clock, due
):
    """Whatever this process's own clock says: it would save alone, and wait for the others."""
    asked = []

    def on_first(work):
        asked.append(work)
        return clock

    settings = config.Checkpoint(every_steps=every_steps, every_minutes=every_minutes)
    checkpoints = Checkpoints(tmp_path, settings)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.agreement, "has_peers", lambda: True)
        patch.setattr(checkpoint_module.agreement, "on_first", on_first)
        assert [step for step in range(1, 25) if checkpoints.due(step)] == due
    checkpoints.close()
    assert len(asked) == (2 if every_minutes else 0)
