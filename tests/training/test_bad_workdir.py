"""Folders of runs that hold something else, and settings of data at their edges: no traceback."""

import pytest

from dynmoe_jax import config
from dynmoe_jax.data import DataError
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import FILE_NAME as METRICS
from dynmoe_jax.runs.metrics_file import MetricsWriter, read_metrics
from dynmoe_jax.runs.summary import FILE_NAME as SUMMARY
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training.health import skips
from dynmoe_jax.training.trainer import train

NOT_JSON = ["", "{", "null", "[1, 2]", "5", '{"step": "x"}', '{"heldout": 3, "sample": 4}', "\x00"]


def test_file_in_place_of_the_checkpoints_is_refused(settings, tmp_path):
    (tmp_path / FOLDER).write_text("not a folder")
    with pytest.raises(config.ConfigError, match=r"cannot be written .*; name another folder"):
        train(settings, tmp_path)
    with pytest.raises(config.ConfigError, match="holds no run"):
        load_run(tmp_path)


@pytest.mark.slow
def test_run_at_the_edges_of_its_settings_among_garbage(settings, change, tmp_path):
    """More shards than documents, a prompt longer than the model's context, noise in the folder."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "old").mkdir()
    (tmp_path / SUMMARY).write_text("{")
    (tmp_path / METRICS).write_text("\n".join(NOT_JSON))
    (tmp_path / skips.FILE_NAME).write_text("{")
    cfg = change(settings, model__moe__backend="reference", train__steps=2)
    cfg = change(
        cfg,
        data__virtual_shards=32,
        data__shuffle_tokens=0,
        data__tokenizer_megabytes=1e6,
        data__domain_weights="text=1e-6",
        evaluation__prompt="the router " * 100,
        evaluation__sample_tokens=2**31 - 1,
        evaluation__temperature=1.2e-38,
        evaluation__max_batches=1,
    )
    assert train(cfg, tmp_path) == 0
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert read_summary(tmp_path).complete
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__vocab_size": 260}, r"vocab_size=260 .* raise it"),
        ({"model__vocab_size": 20000}, r"vocab_size=20000 is more than the \d+ tokens"),
        ({"data__max_megabytes": 1e-6}, "gives no document to train on"),
        ({"data__domain_weights": "text=1,other=2"}, "names other, which the data does not have"),
        ({"data__domain_weights": "other=1"}, "lacks text"),
    ],
)
def test_data_that_does_not_fit_is_refused_before_compiling(
    settings, change, tmp_path, changes, message
):
    with pytest.raises((DataError, config.ConfigError), match=message) as caught:
        train(change(settings, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_prepared_data_that_cannot_be_written_names_its_setting(settings, change, tmp_path, place):
    (tmp_path / "file").write_text("")
    cfg = change(settings, data__directory=str(tmp_path / place))
    with pytest.raises((DataError, config.ConfigError), match=r"config\.data\.directory=.*"):
        train(cfg, tmp_path / "run")


@pytest.mark.parametrize("content", NOT_JSON)
def test_damaged_records_are_passed_over(tmp_path, content, capsys):
    (tmp_path / SUMMARY).write_text(content)
    assert read_summary(tmp_path) is None
    assert "warning: " in capsys.readouterr().out
    (tmp_path / METRICS).write_text('{"step": 1}\n' + content + '\n{"step": 2}\n')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    MetricsWriter(tmp_path, config.Logging(tensorboard=False), 1).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


@pytest.mark.parametrize("content", ["", "{", "5", '[{"first": 1}]', "[3]"])
def test_lost_list_of_left_out_batches_is_no_guess(tmp_path, content):
    (tmp_path / skips.FILE_NAME).write_text(content)
    with pytest.raises(config.ConfigError, match=r"left|leaves out .* delete it to train on them"):
        skips.read_skips(tmp_path)
