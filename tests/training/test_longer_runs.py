"""Runs that are asked for other steps after their learning rate has begun to fall."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.runs.checkpoint import FOLDER, Checkpoints
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.recovery import DAMAGED_FOLDER, recover
from dynmoe_jax.runs.summary import HeldOut, Sample, read_summary
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.training import finish, trainer
from dynmoe_jax.training.longer import DECAYED_FOLDER, before_decay, rise

REPORT = "report.html"
TIMES = {"tokens_per_second", "model_flops_per_second", "mfu", "seconds_step"}


def without_times(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(workdir)
    ]


@pytest.mark.slow
def test_longer_run_is_the_run_that_was_asked_for_so_many_steps_from_the_start(
    settings, change, tmp_path, monkeypatch, saved_state, capsys
):
    """Ten steps and then fifteen, of a small dense model on one device: the same bits."""
    one = jax.devices()[:1]
    types = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.make_mesh((1, 1, 1, 1), MESH_AXES, types, devices=one)
    monkeypatch.setattr(trainer, "make_mesh", lambda *_: mesh)
    # What comes after the last step takes most of the time of so small a run.
    monkeypatch.setattr(
        trainer.HeldOutEvaluation, "__call__", lambda *_: HeldOut(1.0, 1.0, 1.0, {})
    )
    monkeypatch.setattr(finish, "sample", lambda *_: Sample("a", "b"))
    short = change(
        settings,
        model__num_layers=1,
        model__moe__every_n_layers=0,
        train__steps=10,
        train__compilation_cache=str(tmp_path / "compiled"),
        optimizer__schedule="warmup_stable_decay",
        data__directory=str(tmp_path / "data"),
    )
    longer, workdir, straight = change(short, train__steps=15), tmp_path / "a", tmp_path / "b"
    assert trainer.train(short, workdir) == 0
    assert read_metrics(workdir)[-1]["learning_rate"] == pytest.approx(0.55e-2)
    finished = saved_state(workdir, 10)
    capsys.readouterr()
    assert trainer.train(longer, workdir) == 0
    printed = capsys.readouterr().out
    assert trainer.train(longer, straight) == 0

    rates = [line["learning_rate"] for line in read_metrics(workdir)]
    assert rates[2:13] == [rates[2]] * 11
    assert rates[2] > rates[13] > rates[14]
    assert without_times(workdir) == without_times(straight)
    wanted = saved_state(straight, 15)
    for name, array in saved_state(workdir, 15).items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)

    aside = workdir / DECAYED_FOLDER / "10"
    said = [line for line in printed.splitlines() if "Going on from step 8" in line]
    assert said == [
        "Going on from step 8, before the learning rate fell; the checkpoint of step 10, "
        f"where it was lower, is kept in {aside}"
    ]
    assert "after step 8" in printed
    assert (aside / REPORT).exists()
    assert read_summary(aside).step == len(read_metrics(aside)) == 10
    _, decoder, _ = load_run(aside)
    name = next(name for name in finished if "params" in name and "embedding_VD" in name)
    np.testing.assert_array_equal(decoder.embedding_VD.get_value(), finished[name])


@pytest.fixture
def wsd(settings, change):
    """Twenty steps; the rate begins to fall after the sixteenth."""
    return change(
        settings,
        train__steps=20,
        optimizer__schedule="warmup_stable_decay",
        checkpoint__every_steps=100,
    )


@pytest.fixture
def run(tmp_path, capsys):
    """Saves what a run would, without training.

    Returns (step that it goes on after, steps whose checkpoints stay, what it prints).
    """

    def run(cfg, until=None):
        checkpoints = Checkpoints(tmp_path, cfg.checkpoint)
        done = before_decay(cfg, tmp_path, checkpoints, recover(checkpoints) or 0)
        last = until or cfg.train.steps
        for step in range(done + 1, last + 1):
            if step == last or checkpoints.due(step):
                loss = 100.0 - step if cfg.checkpoint.keep_best else None
                checkpoints.save(step, {"x": jnp.full(3, step)}, {}, cfg, loss)
        checkpoints.close()
        folders = [int(path.name) for path in (tmp_path / FOLDER).iterdir()]
        return done, sorted(folders), capsys.readouterr().out

    return run


def test_checkpoint_of_the_step_where_the_decay_begins_stays(run, wsd, change):
    cfg = change(wsd, checkpoint__every_steps=1, checkpoint__keep=1)
    assert run(cfg, until=10)[:2] == (0, [10])
    assert run(cfg, until=18)[:2] == (10, [16, 18])
    assert run(cfg)[:2] == (18, [16, 20])
    # One with another schedule keeps none.
    other = change(cfg, optimizer__schedule="constant", train__steps=24)
    assert run(other)[1] == [24]


def test_other_schedules_save_nothing_besides(run, wsd, change):
    assert run(change(wsd, optimizer__schedule="warmup_cosine"))[:2] == (0, [20])


def test_run_is_made_longer_twice(run, wsd, change, tmp_path):
    assert run(wsd) == (0, [16, 20], "")
    done, kept, said = run(change(wsd, train__steps=30))
    assert (done, kept) == (16, [24, 30])
    assert "Going on from step 16, before" in said
    assert run(change(wsd, train__steps=30)) == (30, [24, 30], "")
    done, kept, said = run(change(wsd, train__steps=40))
    assert (done, kept) == (24, [32, 40])
    assert len(said.splitlines()) == 1
    assert {path.name for path in (tmp_path / DECAYED_FOLDER).iterdir()} == {"20", "30"}


def test_run_that_was_stopped_while_its_rate_fell_is_made_longer(run, wsd, change):
    run(wsd, until=18)
    assert run(wsd, until=19) == (18, [16, 18, 19], "")
    done, kept, said = run(change(wsd, train__steps=30), until=20)
    assert (done, kept) == (16, [16, 20])
    assert "step 19, where it was lower" in said
    # What was asked for last counts: nothing has fallen in this one.
    assert run(change(wsd, train__steps=40), until=22) == (20, [20, 22], "")


def test_step_after_the_start_still_had_the_peak(run, wsd, change):
    run(wsd, until=17)
    assert run(change(wsd, train__steps=30))[0] == 17


def test_run_is_made_shorter_and_longer_again(run, wsd, change, tmp_path):
    """Its rate falls from where it stood when it was made shorter."""
    longer = change(wsd, train__steps=30, checkpoint__keep=1)
    shorter = change(wsd, checkpoint__keep=1)
    run(longer, until=18)
    assert run(shorter, until=19) == (18, [18, 19], "")
    assert run(shorter) == (19, [18, 20], "")
    assert run(longer)[:2] == (18, [24, 30])
    # Fewer steps than were done: nothing to do, and nothing to go back for.
    assert run(shorter) == (30, [24, 30], "")


def test_slower_decay_in_the_middle_of_one_is_a_longer_run_too(run, wsd, change):
    run(wsd, until=19)
    assert run(change(wsd, optimizer__decay_fraction=0.25), until=20)[0] == 19
    assert run(change(wsd, optimizer__final_fraction=1.0))[0] == 16


def test_higher_peak_alone_is_what_somebody_wanted(run, wsd, change):
    run(wsd, until=18)
    assert run(change(wsd, optimizer__learning_rate=1.0))[::2] == (18, "")


def test_best_and_regular_checkpoints_of_the_decay_do_not_come_in_the_way(run, wsd, change):
    cfg = change(
        wsd,
        evaluation__every_steps=2,
        checkpoint__every_steps=2,
        checkpoint__keep_best=2,
        checkpoint__keep_every_steps=6,
    )
    assert run(cfg)[1] == [6, 12, 16, 18, 20]
    assert run(change(cfg, train__steps=30), until=18)[:2] == (16, [6, 12, 16, 18])


def without(workdir, step):
    (workdir / FOLDER / str(step)).rename(workdir / f"lost-{step}")


def damage(workdir, step):
    files = [path for path in (workdir / FOLDER / str(step) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_without_the_checkpoint_of_before_the_rate_rises_and_that_is_said(
    run, wsd, change, tmp_path
):
    run(wsd)
    without(tmp_path, 16)
    done, kept, said = run(change(wsd, train__steps=30))
    assert (done, kept) == (20, [24, 30])
    assert said == (
        "warning: the learning rate rises again after step 20, from 0.00325 to 0.01: no checkpoint "
        "from before it fell is there to go on from.\n"
    )


def test_damaged_checkpoint_of_before_is_set_aside_and_an_older_one_taken(
    run, wsd, change, tmp_path
):
    run(change(wsd, checkpoint__every_steps=5, checkpoint__keep=4))
    damage(tmp_path, 16)
    done, _, said = run(change(wsd, train__steps=30, checkpoint__keep=9))
    assert done == 15
    lines = said.splitlines()
    assert len(lines) == 2
    assert "step 16 is damaged (state/" in lines[0]
    assert f"moved to {tmp_path / DAMAGED_FOLDER / '16'}" in lines[0]
    assert "Going on from step 15" in lines[1]


def test_damaged_checkpoint_of_before_and_no_other(run, wsd, change, tmp_path):
    run(wsd)
    damage(tmp_path, 16)
    done, _, said = run(change(wsd, train__steps=30))
    assert done == 20
    assert "step 16 is damaged" in said
    assert "rises again after step 20" in said


def test_kill_while_setting_aside_repeats_it(run, wsd, change, tmp_path, monkeypatch):
    run(change(wsd, checkpoint__every_steps=2, checkpoint__keep=3))
    (tmp_path / TRAINED).write_bytes(b"a tokenizer")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            run(change(wsd, train__steps=30))
    assert (tmp_path / FOLDER / "20").is_dir()
    assert run(change(wsd, train__steps=30), until=17)[:2] == (16, [16, 17])
    aside = tmp_path / DECAYED_FOLDER / "20"
    assert (aside / FOLDER / "20").is_dir()
    assert (aside / TRAINED).read_bytes() == b"a tokenizer"
    assert not aside.with_name("20_again").exists()


@pytest.mark.parametrize("schedule", ["warmup_cosine", "constant", "warmup_stable_decay"])
def test_rate_of_another_schedule_that_rises_again_is_said(run, wsd, change, schedule):
    cosine = change(wsd, optimizer__schedule="warmup_cosine")
    run(cosine)
    cfg = change(wsd, optimizer__schedule=schedule, train__steps=30)
    done, _, said = run(cfg)
    assert done == 20
    assert "rises again after step 20, from 0.00107 to" in said
    assert f"that is config.optimizer.schedule={schedule!r} with config.train.steps=30." in said
    assert len(said.splitlines()) == 1
    assert run(cfg)[2] == ""


def test_warm_up_is_no_rise(settings, change):
    for schedule in ("warmup_cosine", "constant", "warmup_stable_decay"):
        short = change(settings, optimizer__schedule=schedule, optimizer__warmup_steps=100)
        for step in range(1, 4):
            assert rise(short, change(short, train__steps=5), step) is None
            assert rise(short, change(short, train__steps=9), step) is None
    assert rise(config.Config(), config.Config(), 900) is None
