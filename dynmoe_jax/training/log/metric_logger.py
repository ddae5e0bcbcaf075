"""Metrics of steps: from the arrays on the devices to metrics.jsonl and the progress bar.

Axis legend: N MoE layers, E experts.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.routing import statistics
from dynmoe_jax.runs.metrics_file import MetricsWriter, NoWriter
from dynmoe_jax.runs.summary import HeldOut
from dynmoe_jax.training.health.anomalies import Anomaly, AnomalyWatch
from dynmoe_jax.training.log.hardware import peak_flops_per_second
from dynmoe_jax.training.log.progress import TrainingProgress
from dynmoe_jax.training.loss import Batch

SCALARS = ("loss", "lm_loss", "grad_norm", "learning_rate")
COUNTS = ("skipped_updates", "skipped_in_a_row", "spike_steps")
_ROWS = ("tokens", "load_NE", "dropped_N")
"""Metrics of a step: numbers, counts, and those that others are made of.  Whatever else a step
reports, such as routing losses and their coefficients, has a number of its own, or one for each
MoE layer (``…_N``)."""


class StepRecorder:
    """Turns metrics into records, and measures speed between one record and the next."""

    def __init__(self, cfg: config.Config, step: int):
        self._cfg = cfg
        self._peak = peak_flops_per_second()
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begins a new stretch of time after ``step``, e.g. after an evaluation."""
        self._step, self._since = step, time.perf_counter()

    def record(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
        """The line of ``step``; speed is the mean over the steps since the last record."""
        cfg, values = self._cfg, jax.device_get(dict(metrics))
        now = time.perf_counter()
        steps = max(1, step - self._step)
        seconds = (now - self._since) / steps
        tokens = cfg.train.batch_size * cfg.data.seq_len
        load_NE = values["load_NE"]
        # Of many layers together more than 32 bits count.
        dropped = int(np.sum(values["dropped_N"], dtype=np.int64))
        rows = float(np.sum(load_NE)) - dropped
        if cfg.model.layers:
            rows = (np.sum(load_NE, axis=-1) - values["dropped_N"]).astype(float).tolist()
        flops = training_flops(cfg.model, tokens, cfg.data.seq_len, rows)
        others = [name for name in values if name not in (*SCALARS, *COUNTS, *_ROWS)]
        of_layers = [name for name in others if np.ndim(values[name])]
        others = [name for name in others if name not in of_layers]
        names = [*SCALARS[:2], *others, *SCALARS[2:]]
        record = {name: float(values[name]) for name in names if name in values}
        for name in of_layers:
            value_N, name = values[name], name.removesuffix("_N")
            record |= {name: float(np.nanmean(value_N)), f"{name}_by_layer": value_N.tolist()}
        record |= {name: int(values[name]) for name in COUNTS}
        record |= _routing_record(load_NE, self._exists(load_NE), int(values["tokens"]))
        record |= {
            "rows_dropped": dropped,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "mfu": flops / seconds / self._peak,
            "seconds_step": seconds,
        }
        # From when the step was seen to be done: what has been computed here since is time, too.
        self._step, self._since = step, now
        return record

    def _exists(self, load_NE: np.ndarray) -> np.ndarray | bool:
        """Which experts there are; True where layers do not differ."""
        model = self._cfg.model
        if not model.layers:
            return True
        experts_N = [moe.num_experts for moe in model.moe_settings]
        return statistics.existing_experts(experts_N, load_NE.shape[-1])


def _routing_record(
    load_NE: np.ndarray, exists_NE: np.ndarray | bool, tokens: int
) -> dict[str, Any]:
    if not load_NE.size:  # a dense model
        return {"experts_per_token": 0.0, "unused_experts": 0}
    by_layer_N = load_NE.sum(axis=-1) / max(tokens, 1)
    return {
        "experts_per_token": float(by_layer_N.mean()),
        "experts_per_token_by_layer": by_layer_N.tolist(),
        "load_imbalance_by_layer": statistics.load_imbalance(load_NE, exists_NE).tolist(),
        "unused_experts": statistics.unused_experts(load_NE, exists_NE),
    }


def _heldout_record(heldout: HeldOut) -> dict[str, float]:
    return {"heldout_loss": heldout.loss, "heldout_bits_per_byte": heldout.bits_per_byte}


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A step that was dispatched, and whose metrics may not have been computed yet.

    Attributes:
      number: of the step, from 1.
      metrics: on the devices, by name.
      batch: what the step was trained on, to be had again if it turns out to have gone wrong.
    """

    number: int
    metrics: Mapping[str, jax.Array]
    batch: Batch | None = None


class MetricLogger:
    """Writes and shows the metrics of a run.

    Reading a step waits for it.  Who reads step s-1 after step s was dispatched leaves no device
    idle, and the host is never more than one step ahead of them.  Of several processes, all read
    what steps say and act on it alike; process 0 writes it.

    Attributes:
      anomaly: what the newest step that was read makes necessary; None as a rule.

    Args:
      cfg: all settings.
      workdir: the run's folder.
      done: the step that the run continues after; 0 in a new run.
    """

    def __init__(self, cfg: config.Config, workdir: Path, done: int):
        self._writer = NoWriter()
        if agreement.is_first():
            self._writer = MetricsWriter(workdir, cfg.logging, done)
        self._progress = TrainingProgress(done, cfg.train.steps)
        self._speed = StepRecorder(cfg, done)
        self._every, self._first, self._last = cfg.train.log_every_steps, done + 1, cfg.train.steps
        self._read_until = done
        self._anomalies = AnomalyWatch(cfg, done)
        self.anomaly: Anomaly | None = None

    def __enter__(self) -> "MetricLogger":
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)
        self._writer.close()

    def read(self, pending: PendingStep | None) -> None:
        """Reads a step, once: writes its line if one is due, and looks at it for anomalies."""
        if pending is None or pending.number <= self._read_until:
            return
        step = self._read_until = pending.number
        logged = step % self._every == 0 or step in (self._first, self._last)
        if logged:
            self._write(step, self._speed.record(step, pending.metrics))
        else:
            jax.block_until_ready(pending.metrics)
            self._progress.update(step)
        self._look(pending, logged)

    def read_with_heldout(self, pending: PendingStep, evaluate: Callable[[], HeldOut]) -> HeldOut:
        """Reads a step, evaluates, and adds the result to the step's line.

        The step's speed is measured before, and the evaluation's time is not the next steps'.
        Whatever happens to the evaluation, the step has its line.
        """
        step = self._read_until = pending.number
        record = self._speed.record(step, pending.metrics)
        try:
            heldout = evaluate()
            record |= _heldout_record(heldout)
        finally:
            self._write(step, record)
            self._look(pending, logged=True)
            self._speed.restart(step)
        return heldout

    def owes_heldout(self, step: int) -> bool:
        """Whether the step has a line without the result of an evaluation."""
        lines = self._writer.read()
        return agreement.broadcast(
            any(line["step"] == step and "heldout_loss" not in line for line in lines)
        )

    def complete(self, step: int, evaluate: Callable[[], HeldOut]) -> HeldOut:
        """Evaluates, and adds the result to the line that an earlier process wrote."""
        heldout = evaluate()
        self._writer.add_to(step, _heldout_record(heldout))
        self._speed.restart(step)
        return heldout

    def flush(self, pending: PendingStep | None) -> None:
        """Reads a step, and returns when its line is on disk.

        A checkpoint must not be there before the lines of its steps: the run that goes on from it
        would not write them again.
        """
        self.read(pending)
        self._writer.flush()

    def _look(self, pending: PendingStep, logged: bool) -> None:
        """Reads what every step says about itself; it has been computed by now."""
        self.anomaly = self._anomalies.look(pending.number, pending.metrics, pending.batch)
        if logged:
            self._anomalies.look_at_routing(pending.number, pending.metrics)

    def _write(self, step: int, record: dict[str, Any]) -> None:
        self._writer.write(step, record)
        self._progress.update(step, record)
