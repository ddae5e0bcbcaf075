"""What is written while training must survive crashes, resumption and numbers that are none."""

import json
import math
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from dynmoe_jax import config
from dynmoe_jax.runs.metrics_file import MetricsWriter, check_packages, read_metrics

FILE_ONLY = config.Logging(tensorboard=False)


def write(workdir, steps, resume_step=0, logging=FILE_ONLY, **metrics):
    with MetricsWriter(workdir, logging, resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": float(step), **metrics})


def read_events(workdir):
    """The events of all TensorBoard files, oldest file first (TFRecord framing)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_resume_removes_the_steps_that_will_be_repeated(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    write(tmp_path, [30, 40, 50], resume_step=20)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40, 50]


def test_restart_from_nothing_removes_everything(tmp_path):
    write(tmp_path, [10, 20])
    write(tmp_path, [10], resume_step=0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [10]


def test_resume_removes_a_half_written_last_line(tmp_path):
    write(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 25, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
    write(tmp_path, [30], resume_step=25)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_resume_does_not_glue_two_lines_when_the_newline_was_lost(tmp_path):
    write(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    write(tmp_path, [30], resume_step=20)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_a_crash_while_old_lines_are_removed_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, [10, 20, 30])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        MetricsWriter(tmp_path, FILE_ONLY, resume_step=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    with MetricsWriter(tmp_path, FILE_ONLY, 0) as writer:
        writer.write(1, {"loss": 2.5})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5}]


def test_non_finite_numbers_stay_valid_json_and_come_back_as_nan(tmp_path):
    write(tmp_path, [1], grad_norm=math.inf, by_layer=[1.0, math.nan], mfu=np.float32("nan"))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert (record["grad_norm"], record["by_layer"], record["mfu"]) == (None, [1.0, None], None)
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["grad_norm"])
    assert math.isnan(line["by_layer"][1])


def test_arrays_are_written_as_numbers_and_lists(tmp_path):
    write(tmp_path, [np.int64(3)], a=np.float32(0.5), b=np.arange(2, dtype=np.float32))
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 3.0, "a": 0.5, "b": [0.0, 1.0]}]


def test_tensorboard_gets_every_scalar_and_every_layer(tmp_path):
    write(tmp_path, [7], logging=config.Logging(), experts=[1.5, np.float32(2.5)], gone=[])
    values = {
        v.tag: (e.step, v.simple_value) for e in read_events(tmp_path) for v in e.summary.value
    }
    assert values == {
        "loss": (7, 7.0),
        "experts/layer_00": (7, 1.5),
        "experts/layer_01": (7, 2.5),
    }


def test_resume_tells_tensorboard_to_forget_later_steps(tmp_path):
    write(tmp_path, [10, 20, 30], logging=config.Logging())
    write(tmp_path, [30], resume_step=20, logging=config.Logging())
    starts = [e.step for e in read_events(tmp_path) if e.session_log.status]
    assert starts[-1] == 21


def test_tensorboard_can_be_turned_off(tmp_path):
    write(tmp_path, [1])
    assert not (tmp_path / "tensorboard").exists()


def test_missing_wandb_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_packages(config.Logging())
    with pytest.raises(config.ConfigError, match=r"pip install 'dynmoe_jax\[wandb\]'"):
        check_packages(config.Logging(wandb_project="moe"))


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    started, logged = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**arguments):
        started.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    logging = config.Logging(tensorboard=False, wandb_project="moe")
    write(tmp_path / "run", [1], logging=logging, experts=[2.0])
    write(tmp_path / "run", [2], logging=logging, resume_step=1)
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["project"] == "moe"
    assert logged[:2] == [(1, {"loss": 1.0, "experts/layer_00": 2.0}), "finished"]
