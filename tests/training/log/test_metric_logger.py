"""From a step's arrays to its line: the numbers by hand, the rhythm, the clock."""

import contextlib

import numpy as np
import pytest

from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import HeldOut
from dynmoe_jax.training.health.anomalies import Spike, TooManySkips
from dynmoe_jax.training.log import metric_logger
from dynmoe_jax.training.log.metric_logger import COUNTS, SCALARS, MetricLogger, PendingStep

PEAK = 1e9
HELDOUT = HeldOut(loss=3.0, bits_per_byte=1.5, unigram_entropy=5.0, domains={})


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(metric_logger.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(metric_logger, "peak_flops_per_second", lambda: PEAK)
    return Clock


@pytest.fixture
def cfg(settings, change):
    return change(settings, train__steps=10)


def step_metrics(step=1, load_NE=((8, 0, 4, 4), (16, 16, 0, 0)), tokens=16, dropped=0):
    scalars = {name: np.float32(step + i) for i, name in enumerate(SCALARS)}
    counts = {"load_NE": np.array(load_NE, np.int32), "tokens": np.int32(tokens)}
    counts |= {name: np.int32(0) for name in COUNTS}
    return scalars | counts | {"dropped_N": np.array([dropped, 0], np.int32)}


class Loop:
    """Reads each step when the next one has been dispatched, as the trainer does."""

    def __init__(self, log):
        self.log, self.pending = log, None

    def dispatch(self, number, metrics, batch=None):
        previous, self.pending = self.pending, PendingStep(number, metrics, batch)
        self.log.read(previous)

    def evaluate(self, evaluate):
        return self.log.read_with_heldout(self.pending, evaluate)


@contextlib.contextmanager
def looped(cfg, workdir, done=0):
    with MetricLogger(cfg, workdir, done) as log:
        loop = Loop(log)
        yield loop
        log.read(loop.pending)


def record(cfg, workdir, clock, metrics, seconds=2.0):
    with looped(cfg, workdir) as loop:
        clock.now += seconds
        loop.dispatch(1, metrics)
    return read_metrics(workdir)[0]


def test_numbers_of_a_line_by_hand(cfg, tmp_path, clock):
    line = record(cfg, tmp_path, clock, step_metrics())
    assert [line[name] for name in SCALARS] == [1, 2, 3, 4]
    # 16 valid tokens chose 16 experts in layer 0 and 32 in layer 1.
    assert line["experts_per_token_by_layer"] == [1.0, 2.0]
    assert line["experts_per_token"] == 1.5
    # The busiest expert over the mean: 8 / 4, and 16 / 8; experts without a token: 1 + 2.
    assert line["load_imbalance_by_layer"] == [2.0, 2.0]
    assert line["unused_experts"] == 3
    # 8 sequences of 32 positions in two seconds, padding included.
    assert line["tokens_per_second"] == 8 * 32 / 2
    assert line["seconds_step"] == 2.0


def test_flops_are_those_of_the_rows_that_were_computed(cfg, tmp_path, clock):
    whole = record(cfg, tmp_path / "whole", clock, step_metrics())
    flops = training_flops(cfg.model, tokens=256, length=32, rows=48)
    np.testing.assert_allclose(whole["model_flops_per_second"], flops / 2)
    np.testing.assert_allclose(whole["mfu"], flops / 2 / PEAK)
    fewer = record(cfg, tmp_path / "fewer", clock, step_metrics(dropped=18))
    flops = training_flops(cfg.model, tokens=256, length=32, rows=30)
    np.testing.assert_allclose(fewer["model_flops_per_second"], flops / 2)
    assert fewer["rows_dropped"] == 18


def test_dropped_rows_of_many_layers_do_not_wrap(cfg, tmp_path, clock):
    metrics = step_metrics() | {"dropped_N": np.full(4, 2**30, np.int32)}
    assert record(cfg, tmp_path, clock, metrics)["rows_dropped"] == 2**32


def test_step_is_read_when_the_next_is_under_way(cfg, tmp_path, clock):
    """Reading at once would leave the device idle between steps."""
    with looped(cfg, tmp_path) as loop:
        clock.now += 1.0
        loop.dispatch(1, step_metrics(1))
        assert read_metrics(tmp_path) == []
        loop.dispatch(2, step_metrics(2))
        clock.now += 1.0
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_first_last_and_every_nth_step_are_written(cfg, change, tmp_path, clock):
    cfg = change(cfg, train__log_every_steps=4)
    with looped(cfg, tmp_path, done=2) as loop:
        for step in range(3, 11):
            clock.now += 1.0
            loop.dispatch(step, step_metrics(step))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 8, 10]
    # The clock is read when the next step is added: step 4 after one second, 8 after four.
    assert [line["seconds_step"] for line in lines[1:3]] == [1.0, 1.0]


def test_time_that_a_line_takes_is_counted(cfg, tmp_path, clock, monkeypatch):
    """The device computes meanwhile: ten steps in ten seconds must not look like five."""
    routing_record = metric_logger._routing_record

    def slowly(*arguments):
        clock.now += 0.5
        return routing_record(*arguments)

    monkeypatch.setattr(metric_logger, "_routing_record", slowly)
    with looped(cfg, tmp_path) as loop:
        for step in range(1, 11):
            clock.now += 0.5
            loop.dispatch(step, step_metrics(step))
    assert [line["seconds_step"] for line in read_metrics(tmp_path)][1:9] == [1.0] * 8


def test_evaluation_joins_its_step_and_is_not_counted_as_training(cfg, tmp_path, clock):
    def evaluate():
        clock.now += 100.0
        return HELDOUT

    with looped(cfg, tmp_path) as loop:
        clock.now += 1.0
        loop.dispatch(1, step_metrics(1))
        assert loop.evaluate(evaluate) is HELDOUT
        clock.now += 1.0
        loop.dispatch(2, step_metrics(2))
    first, second = read_metrics(tmp_path)
    assert (first["heldout_loss"], first["heldout_bits_per_byte"]) == (3.0, 1.5)
    assert (first["seconds_step"], second["seconds_step"]) == (1.0, 1.0)
    assert "heldout_loss" not in second


def test_dense_model_uses_no_experts(cfg, tmp_path, clock):
    line = record(cfg, tmp_path, clock, step_metrics(load_NE=np.zeros((0, 1))))
    assert (line["experts_per_token"], line["unused_experts"]) == (0.0, 0)
    assert "load_imbalance_by_layer" not in line


def test_batch_of_padding_alone_is_no_division_by_zero(cfg, tmp_path, clock):
    line = record(cfg, tmp_path, clock, step_metrics(load_NE=np.zeros((2, 4)), tokens=0))
    assert line["experts_per_token"] == 0.0
    assert line["load_imbalance_by_layer"] == [0.0, 0.0]


def test_every_step_is_looked_at_even_if_it_is_not_logged(cfg, change, tmp_path, clock):
    """A run must stop at the step after its last chance, not at the next line of its log."""
    cfg = change(cfg, train__log_every_steps=5, train__max_skipped_in_a_row=2)
    with looped(cfg, tmp_path) as loop:
        for step in range(1, 4):
            clock.now += 1.0
            skipped = {"skipped_in_a_row": np.int32(step - 1), "loss": np.float32(np.nan)}
            loop.dispatch(step, step_metrics(step) | skipped, {"tokens": step})
            assert loop.log.anomaly is None
    assert loop.log.anomaly == TooManySkips(step=3, count=2, batch={"tokens": 3})


def test_evaluation_step_is_looked_at_too(cfg, change, tmp_path, clock):
    cfg = change(cfg, train__spike_action="rollback", train__spike_steps=4)
    with looped(cfg, tmp_path, done=6) as loop:
        clock.now += 1.0
        loop.dispatch(7, step_metrics(7) | {"spike_steps": np.int32(4)})
        loop.evaluate(lambda: HELDOUT)
        assert loop.log.anomaly == Spike(first=4, last=7)


@pytest.mark.parametrize(("action", "said"), [("none", ""), ("warn", "the loss has jumped to 1")])
def test_spike_is_said_once_or_not_at_all(cfg, change, tmp_path, clock, capsys, action, said):
    cfg = change(cfg, train__spike_action=action, train__spike_steps=2)
    with looped(cfg, tmp_path) as loop:
        for step in range(1, 5):
            clock.now += 1.0
            loop.dispatch(step, step_metrics(1) | {"spike_steps": np.int32(step)})
        clock.now += 1.0
    assert loop.log.anomaly is None
    assert capsys.readouterr().out.count("warning:") == bool(said)
