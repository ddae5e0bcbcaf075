"""Whole runs: what they leave behind, how they stop, go on, and refuse to."""

import json
import os
import re
import shutil

import jax
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.data import DataError, TrainStream, open_tokenizer
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.training import feed, trainer
from dynmoe_jax.training.trainer import train
from tests.small_run import interrupt_at

pytestmark = pytest.mark.slow

NAMES = (
    "step loss lm_loss balance_loss entropy_loss router_z_loss grad_norm learning_rate "
    "experts_per_token experts_per_token_by_layer load_imbalance_by_layer unused_experts "
    "skipped_updates skipped_in_a_row spike_steps "
    "rows_dropped tokens_per_second model_flops_per_second mfu seconds_step"
)
TIMES = {"tokens_per_second", "model_flops_per_second", "mfu", "seconds_step"}


def without_times(workdir):
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(workdir)
    ]


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir)]


def assert_identical(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name, strict=True)


@pytest.fixture(scope="module")
def whole(settings, change, tmp_path_factory):
    """A run that nothing disturbed, with a checkpoint of every step."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    cfg = change(settings, checkpoint__every_steps=1, checkpoint__keep=10)
    cfg = change(cfg, evaluation__every_steps=3, logging__tensorboard=True)
    assert train(cfg, workdir) == 0
    return cfg, workdir


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that a test may spoil."""
    return whole[0], shutil.copytree(whole[1], tmp_path / "copy")


def test_run_leaves_everything_it_names(whole):
    cfg, workdir = whole
    summary = read_summary(workdir)
    assert summary.complete
    assert (summary.step, summary.steps) == (6, 6)
    assert not [path for path in summary.paths.values() if not (workdir / path).exists()]
    assert set(summary.heldout.domains) == {"text"}
    assert {"data preparation", "compile", "step", "evaluation", "total"} <= set(summary.seconds)
    assert "<svg" in (workdir / "report.html").read_text(encoding="utf-8")
    assert open_tokenizer(workdir / "tokenizer.model").vocab_size == cfg.model.vocab_size
    assert list((workdir / "tensorboard").glob("events*"))


def test_every_step_is_logged_under_the_promised_names(whole):
    lines = read_metrics(whole[1])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        heldout = {"heldout_loss", "heldout_bits_per_byte"} if line["step"] in (3, 6) else set()
        assert set(line) == set(NAMES.split()) | heldout
        assert np.all(np.isfinite([value for value in line.values() if np.isscalar(value)]))
        np.testing.assert_allclose(
            line["experts_per_token"], np.mean(line["experts_per_token_by_layer"])
        )
    assert lines[-1]["heldout_loss"] == read_summary(whole[1]).heldout.loss


def test_model_learns(whole):
    lines = losses(whole[1])
    assert lines[-1] < lines[0] - 0.3


def test_complete_run_shows_its_table_and_trains_nothing(copy, monkeypatch, capsys):
    cfg, workdir = copy
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    monkeypatch.setattr(trainer, "load_text", lambda *_: pytest.fail("read the data"))
    assert train(cfg, workdir) == 0
    printed = capsys.readouterr().out
    assert "is complete: 6 steps" in printed
    assert "Bits per byte" in printed
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_lost_summary_is_written_again(copy):
    cfg, workdir = copy
    before, lines = read_summary(workdir), read_metrics(workdir)
    (workdir / "summary.json").unlink()
    (workdir / "report.html").unlink()
    assert train(cfg, workdir) == 0
    after = read_summary(workdir)
    assert (after.heldout, after.sample) == (before.heldout, before.sample)
    assert (workdir / "report.html").exists()
    assert read_metrics(workdir) == lines


def test_stopped_and_continued_run_is_the_run_that_never_stopped(
    whole, change, tmp_path, monkeypatch, saved_state, capsys
):
    """Catches lost data positions, and checkpoints of buffers that the next step had taken."""
    cfg, undisturbed = whole
    cfg = change(cfg, checkpoint__every_steps=100, logging__tensorboard=False)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train(cfg, tmp_path) == EXIT_INTERRUPTED
    assert "Stopped after step 3 and saved" in capsys.readouterr().out
    assert len(read_metrics(tmp_path)) == 3
    assert "heldout_loss" not in read_metrics(tmp_path)[-1]
    assert not (tmp_path / "summary.json").exists()
    # The undisturbed run went on, and donated its state, while this was being written.
    assert_identical(saved_state(undisturbed, 3), saved_state(tmp_path, 3))
    assert train(cfg, tmp_path) == 0
    assert "after step 3" in capsys.readouterr().out
    # The evaluation that was due after step 3, too: who stops a run does not wait for it.
    assert without_times(tmp_path) == without_times(undisturbed)
    assert_identical(saved_state(tmp_path, 6), saved_state(undisturbed, 6))
    assert read_summary(tmp_path).heldout == read_summary(undisturbed).heldout


def test_killed_run_repeats_the_steps_after_its_checkpoint(copy, whole, saved_state):
    """No second line of a step, and nothing of the step whose checkpoint is missing."""
    cfg, workdir = copy
    for step in (3, 4, 5, 6):
        shutil.rmtree(workdir / FOLDER / str(step))
    (workdir / "summary.json").unlink()
    assert train(cfg, workdir) == 0
    assert without_times(workdir) == without_times(whole[1])
    assert_identical(saved_state(workdir, 6), saved_state(whole[1], 6))


def test_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(
    copy, whole, saved_state, capsys
):
    cfg, workdir = copy
    (workdir / "summary.json").unlink()
    files = [path for path in (workdir / FOLDER / "6" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert train(cfg, workdir) == 0
    printed = capsys.readouterr().out
    assert "step 6 is damaged" in printed
    assert "after step 5" in printed
    assert without_times(workdir) == without_times(whole[1])
    assert_identical(saved_state(workdir, 6), saved_state(whole[1], 6))


def test_second_run_in_a_folder_is_refused_and_writes_nothing(settings, tmp_path):
    with locked(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(config.ConfigError, match=f"in use by process {os.getpid()} on host"):
            train(settings, tmp_path)
    assert set(tmp_path.rglob("*")) - set(before) <= {tmp_path / FOLDER}


def test_fewer_steps_than_were_done_show_what_there_is(copy, change, capsys):
    cfg, workdir = copy
    assert train(change(cfg, train__steps=2), workdir) == 0
    assert "is complete: 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model__width", 24),
        ("model__moe__top_p__threshold", 0.6),
        ("seed", 1),
        ("train__batch_size", 16),
    ],
)
def test_run_with_another_model_or_data_is_refused_in_one_sentence(copy, change, name, value):
    cfg, workdir = copy
    setting = f"config.{name.replace('__', '.')}={value}"
    with pytest.raises(config.ConfigError, match=f"{setting} differs from .* new run") as caught:
        train(change(cfg, **{name: value}), workdir)
    assert "\n" not in str(caught.value)


def test_other_data_is_refused_before_it_is_written(settings, change, tmp_path):
    for sources, sentence in (("txt:*", "did you mean 'text:GLOB'"), ("text:no*", "no file")):
        with pytest.raises(trainer.BAD_INPUT, match=sentence):
            train(change(settings, data__sources=sources), tmp_path / "run")
    with pytest.raises(config.ConfigError, match="a multiple of the 8 devices"):
        train(change(settings, train__batch_size=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_single_document_is_refused_before_training(settings, change, tmp_path):
    """Nothing could be held out, and the run would fail at its end."""
    (tmp_path / "book.txt").write_text("the router chooses " * 500, encoding="utf-8")
    cfg = change(settings, data__sources=f"text:{tmp_path}/book.txt")
    with pytest.raises(DataError, match=r"none can be held out .* split the text"):
        train(cfg, tmp_path / "run")


def test_more_steps_and_free_settings_continue_a_complete_run(copy, change, capsys):
    cfg, workdir = copy
    cfg = change(
        cfg,
        train__steps=7,
        optimizer__learning_rate=1e-4,
        loss__entropy__weight=0.0,
        model__moe__backend="reference",
        evaluation__prompt="router ",
    )
    assert train(cfg, workdir) == 0
    shown = dict(re.findall(r"^(\S+\.\S+) +(\S+)", capsys.readouterr().out, re.MULTILINE))
    assert shown["train.steps"] == "7"
    assert shown["model.moe.backend"] == "reference"
    assert "optimizer.b1" not in shown  # as it is by default
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6, 7]
    assert read_metrics(workdir)[-1]["learning_rate"] < 1e-4
    summary = read_summary(workdir)
    assert (summary.steps, summary.sample.prompt) == (7, "router ")


def only(count, monkeypatch):
    """Training sees so many devices."""

    def mesh_of_some(mesh, batch_size):
        del mesh, batch_size
        types = (jax.sharding.AxisType.Auto,) * 4
        return jax.make_mesh((1, count, 1, 1), MESH_AXES, types, devices=jax.devices()[:count])

    monkeypatch.setattr(trainer, "make_mesh", mesh_of_some)


def test_run_moves_to_fewer_devices_and_back(copy, whole, monkeypatch):
    """Saved on 8, on 4 and on 1 device, and restored on each of the next."""
    cfg, workdir = copy
    for step in (3, 4, 5, 6):
        shutil.rmtree(workdir / FOLDER / str(step))
    (workdir / "summary.json").unlink()
    batches, following = [], TrainStream.__next__

    def take(stream):
        batches.append(following(stream))
        return batches[-1]

    monkeypatch.setattr(TrainStream, "__next__", take)
    for step, devices in ((3, 4), (5, 1)):
        with monkeypatch.context() as patch:
            only(devices, patch)
            interrupt_at(patch, step)
            assert train(cfg, workdir) == EXIT_INTERRUPTED
    assert train(cfg, workdir) == 0
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(workdir), losses(whole[1]), rtol=1e-5)
    prepared, tokenizer = load_text(cfg, whole[1], None)
    with TrainStream(prepared, tokenizer, cfg.data, 8, cfg.seed) as stream:
        wanted = [following(stream) for _ in range(6)][2:]
    for batch, want in zip(batches, wanted, strict=True):
        assert_identical(batch, want)


def test_one_device_and_eight_see_the_same_losses(whole, settings, tmp_path, monkeypatch):
    only(1, monkeypatch)
    assert train(settings, tmp_path) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(whole[1]), rtol=1e-5)
    assert read_summary(tmp_path).heldout.domains.keys() == {"text"}


def test_dense_model_trains_the_same_in_microbatches(
    settings, change, tmp_path, capsys, monkeypatch
):
    only(1, monkeypatch)
    cfg = change(settings, model__moe__every_n_layers=0, train__batch_size=16, train__steps=2)
    assert train(cfg, tmp_path / "one") == 0
    assert "Experts per token" not in capsys.readouterr().out
    assert train(change(cfg, train__microbatches=2), tmp_path / "two") == 0
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    summary = read_summary(tmp_path / "one")
    assert summary.parameters == summary.active_parameters
    assert summary.heldout.experts_per_token_by_layer == []
    lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["experts_per_token"] for line in strict] == [0, 0]


def test_evaluation_that_fails_does_not_cost_the_last_step(settings, change, tmp_path, monkeypatch):
    cfg = change(settings, train__steps=2)
    with monkeypatch.context() as broken:
        broken.setattr(trainer.HeldOutEvaluation, "__call__", _out_of_memory)
        with pytest.raises(MemoryError):
            train(cfg, tmp_path)
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert train(cfg, tmp_path) == 0


def _out_of_memory(*_):
    raise MemoryError


def test_tokenizer_of_a_run_that_never_began_is_made_anew(settings, change, tmp_path):
    """A refused or aborted start with other settings leaves its tokenizer behind."""
    for size in (290, 300):
        load_text(change(settings, model__vocab_size=size), tmp_path, None)
        assert open_tokenizer(tmp_path / "tokenizer.model").vocab_size == size
    own, other = str(tmp_path / "tokenizer.model"), tmp_path / "other"
    cfg = change(settings, model__vocab_size=280, data__tokenizer=own)
    with pytest.raises(config.ConfigError, match="vocab_size=280 is smaller than the 300 tokens"):
        load_text(cfg, other, None)
    assert not (other / "tokenizer.model").exists()


def test_last_step_before_a_failure_has_its_line(settings, tmp_path, monkeypatch):
    """Its metrics are still on the device when the next batch cannot be read."""
    place = feed.Feed.place

    def third_fails(self, batch, seen=[]):  # noqa: B006
        seen.append(batch)
        if len(seen) == 3:
            raise DataError("The third batch is damaged.")
        return place(self, batch)

    monkeypatch.setattr(feed.Feed, "place", third_fails)
    with pytest.raises(DataError, match="third"):
        train(settings, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_settings_with_brackets_are_shown_as_they_are(settings, change, capsys, tmp_path):
    cfg = change(settings, evaluation__prompt="[/INST] a")
    trainer._print_settings(cfg, tmp_path / "[run]", 0)
    printed = capsys.readouterr().out
    assert "[/INST] a" in printed
    assert "[run]" in printed
