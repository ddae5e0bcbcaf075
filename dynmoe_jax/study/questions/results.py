"""Results of a study's runs, as questions read them.

Axis legend: S seeds, R bootstrap replicates, X logged lines.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from dynmoe_jax import config
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.summary import Summary
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import LAST_SHARE, Arm, Request, logged_lines, summary_of
from dynmoe_jax.study.measures import MEASURES
from dynmoe_jax.study.measures.measuring import measured
from dynmoe_jax.study.statistics import REPLICATES, Estimate, estimate, resampled_lines


@dataclasses.dataclass(frozen=True)
class Logged:
    """A number of a run's log.

    Attributes:
      value_X: of each line.
      weight_X: steps that the line stands for, those since the one before.
      seed: of the run.
      first: step of the first line.
    """

    value_X: Float[np.ndarray, "X"]
    weight_X: Float[np.ndarray, "X"]
    seed: int
    first: int

    @property
    def mean(self) -> float:
        """Mean over steps; NaN where there are none."""
        return float(np.average(self.value_X, weights=self.weight_X)) if len(self.value_X) else _NAN

    @property
    def mean_R(self) -> Float[np.ndarray, "R"]:
        """The same of resampled lines."""
        if not len(self.value_X):
            return np.full(REPLICATES, _NAN)
        number_RX = resampled_lines(len(self.value_X), self.seed, self.first)
        return np.average(self.value_X[number_RX], axis=1, weights=self.weight_X[number_RX])


_NAN = math.nan
LOADING = 4.0
"""Times the median that a step may take and count as one that computes alone."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one run.

    Attributes:
      arm: the run.
      config: its settings.
      summary: what it says of itself.
      metrics: lines of its ``metrics.jsonl``.
      measures: records by the name of the measure.
    """

    arm: Arm
    config: config.Config
    summary: Summary
    metrics: list[dict[str, Any]]
    measures: dict[str, dict[str, Any]]

    @property
    def reached(self) -> Logged:
        """Experts per token at the end of training."""
        return self.logged("experts_per_token", 1 - LAST_SHARE)

    @property
    def heldout(self) -> dict[str, Any]:
        """Its held-out loss, see :mod:`dynmoe_jax.study.measures.heldout`."""
        return self.measures["heldout"]

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return bool(self.config.model.moe_settings)

    def logged(self, name: str, first: float = 0.0, last: float = 1.0) -> Logged:
        """A number of the log from one share of training to another."""
        step_X = np.array([line["step"] for line in self.metrics], float)
        value_X = np.array([line[name] for line in self.metrics], float)
        steps = self.config.train.steps
        inside_X = (step_X > first * steps) & (step_X <= last * steps)
        weight_X = np.diff(step_X, prepend=0.0)
        first_step = int(step_X[inside_X][0]) if inside_X.any() else 0
        return Logged(value_X[inside_X], weight_X[inside_X], self.arm.seed, first_step)

    @property
    def experts_in_training(self) -> float:
        """Mean experts per token over all of training; NaN of a dense model."""
        return self.logged("experts_per_token").mean if self.is_moe else math.nan

    def flops_of_step(self, experts: float) -> float:
        """FLOPs of a step in which tokens use so many experts."""
        model, length = self.config.model, self.config.data.seq_len
        tokens = self.config.train.batch_size * length
        return training_flops(model, tokens, length, experts * tokens * model.num_moe_layers)

    @property
    def training_flops(self) -> float:
        """FLOPs of all of training, of the experts that were used."""
        experts = self.experts_in_training if self.is_moe else 0.0
        return self.config.train.steps * self.flops_of_step(experts)

    @property
    def step_times(self) -> Logged:
        """Seconds of steps, without those that load programs: the first one, and after a stop."""
        times = self.logged("seconds_step")
        usual_X = times.value_X <= LOADING * np.median(times.value_X)
        weight_X = np.where(usual_X, times.weight_X, 0.0)
        return dataclasses.replace(times, weight_X=weight_X)

    @property
    def seconds_step(self) -> float:
        """Seconds of a step, mean."""
        return self.step_times.mean

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return self.seconds_step * self.config.train.steps

    def record(self) -> dict[str, Any]:
        """For ``study.json``."""
        heldout = self.heldout
        return {
            "name": self.arm.model,
            "title": MODELS[self.arm.model].title,
            "seed": self.arm.seed,
            "steps": self.config.train.steps,
            "learning_rate": self.config.optimizer.learning_rate,
            "heldout_bits_per_byte": heldout["bits_per_byte"],
            "heldout_bits_per_byte_by_domain": heldout["domains"],
            "experts_per_token_in_training": self.experts_in_training,
            "experts_per_token_at_inference": heldout.get("experts_per_token", math.nan),
            "parameters": heldout["parameters"],
            "active_parameters": heldout["active_parameters"],
            "flops": self.training_flops,
            "flops_per_token_at_inference": heldout["flops_per_token"],
            "seconds": self.seconds,
            "seconds_per_step": self.seconds_step,
            "accuracy": {
                task: found["accuracy"] for task, found in self.measures.get("items", {}).items()
            },
        }


class Results:
    """Results of all runs of a study that are complete.

    Args:
      asked: the request.
      arms: all runs.
    """

    def __init__(self, asked: Request, arms: list[Arm]):
        self.asked = asked
        found = [_read(asked, arm) for arm in arms]
        self.all = [result for result in found if result]

    def of(self, model: str) -> list[Result]:
        """Results of a model by seed, those of a grid aside."""
        found = [r for r in self.all if r.arm.model == model and r.arm.rate is None]
        return sorted(found, key=lambda result: result.arm.seed)

    def have(self, *models: str) -> bool:
        """Whether there is a result of each of the models."""
        return all(self.of(model) for model in models)

    @property
    def tokens(self) -> int:
        """Tokens that a model of the comparison is trained on."""
        base = self.asked.base
        return base.train.steps * base.train.batch_size * base.data.seq_len

    def mean(self, model: str, number: Callable[[Result], float]) -> Estimate:
        """A number of a model over its seeds."""
        return estimate([number(result) for result in self.of(model)])

    def loss(self, model: str) -> Estimate:
        """Bits per byte of a model."""
        return estimate(*_with_replicates([r.heldout for r in self.of(model)], "bits_per_byte"))

    def loss_less(self, model: str, other: str) -> Estimate:
        """Bits per byte of a model less those of another one from the same seed."""
        return self.difference(model, other, lambda result: result.heldout, "bits_per_byte")

    def difference(
        self, model: str, other: str, record: Callable[[Result], dict], name: str
    ) -> Estimate:
        """A number of a model less that of another one, seed by seed and document by document."""
        pairs = self.pairs(model, other)
        ours, theirs = ([record(pair[side]) for pair in pairs] for side in (0, 1))
        (value_S, replicate_SR), (other_S, other_SR) = (
            _with_replicates(records, name) for records in (ours, theirs)
        )
        return estimate(np.subtract(value_S, other_S), np.subtract(replicate_SR, other_SR))

    def pairs(self, model: str, other: str) -> list[tuple[Result, Result]]:
        """Runs of two models from the same seeds."""
        by_seed = {result.arm.seed: result for result in self.of(other)}
        return [(r, by_seed[r.arm.seed]) for r in self.of(model) if r.arm.seed in by_seed]


def of_logs(logs: list[Logged]) -> Estimate:
    """The mean of a logged number over seeds."""
    return estimate([log.mean for log in logs], np.array([log.mean_R for log in logs]))


def of_records(records: list[dict], name: str) -> Estimate:
    """A number of records of several seeds, with their replicates."""
    return estimate(*_with_replicates(records, name))


def _with_replicates(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    value_S = np.array([record[name] for record in records], float)
    return value_S, np.array([record[f"{name}_R"] for record in records], float)


def _read(asked: Request, arm: Arm) -> Result | None:
    summary, folder = summary_of(arm, asked), arm.folder(asked)
    if not (summary and summary.complete):
        return None
    read = {name: measured(folder, name, summary.step, asked.items) for name in MEASURES}
    measures = {name: found for name, found in read.items() if found is not None}
    if "heldout" not in measures:
        return None
    cfg = arm.settings(asked)
    return Result(arm, cfg, summary, logged_lines(folder, cfg.train), measures)
