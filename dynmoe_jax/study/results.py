"""Results of a study's runs, as questions read them.

Axis legend: S seeds, R bootstrap replicates over documents.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import Summary
from dynmoe_jax.study.measuring import measured
from dynmoe_jax.study.models import MODELS
from dynmoe_jax.study.plan import Arm, Request, reached_experts, summary_of
from dynmoe_jax.study.statistics import Estimate, estimate


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one run.

    Attributes:
      arm: the run.
      config: its settings.
      summary: what it says of itself.
      metrics: lines of its ``metrics.jsonl``.
      measures: records by the name of the measure.
      reached: mean experts per token at the end of training; NaN of a dense model.
    """

    arm: Arm
    config: config.Config
    summary: Summary
    metrics: list[dict[str, Any]]
    measures: dict[str, dict[str, Any]]
    reached: float

    @property
    def heldout(self) -> dict[str, Any]:
        """Its held-out loss, see :mod:`.measures.heldout`."""
        return self.measures["heldout"]

    @property
    def is_moe(self) -> bool:
        """Whether it has experts."""
        return bool(self.config.model.moe_settings)

    @property
    def experts_in_training(self) -> float:
        """Mean experts per token over all of training."""
        return self._over_training("experts_per_token") if self.is_moe else math.nan

    @property
    def training_flops(self) -> float:
        """FLOPs of all of training, of the experts that were used."""
        cfg, experts = self.config, self.experts_in_training if self.is_moe else 0.0
        tokens = cfg.train.batch_size * cfg.data.seq_len
        rows = experts * tokens * cfg.model.num_moe_layers
        return cfg.train.steps * training_flops(cfg.model, tokens, cfg.data.seq_len, rows)

    @property
    def seconds_step(self) -> float:
        """Seconds of a step, median of the logged ones but the first."""
        lines = self.metrics[1:] or self.metrics
        return float(np.median([line["seconds_step"] for line in lines]))

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return self._over_training("seconds_step") * self.config.train.steps

    def _over_training(self, name: str) -> float:
        """Mean over steps of what is logged, each line standing for the steps since the last."""
        steps = np.array([line["step"] for line in self.metrics], float)
        values = np.array([line[name] for line in self.metrics], float)
        return float(np.average(values, weights=np.diff(steps, prepend=0.0)))

    def between(self, first: float, last: float, name: str) -> float:
        """Mean of a logged number from one share of training to another."""
        steps = self.config.train.steps
        chosen = [x[name] for x in self.metrics if first * steps < x["step"] <= last * steps]
        return float(np.mean(chosen)) if chosen else math.nan

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
        by_seed = {result.arm.seed: result for result in self.of(other)}
        pairs = [(r, by_seed[r.arm.seed]) for r in self.of(model) if r.arm.seed in by_seed]
        ours, theirs = ([record(pair[side]) for pair in pairs] for side in (0, 1))
        (value_S, replicate_SR), (other_S, other_SR) = (
            _with_replicates(records, name) for records in (ours, theirs)
        )
        return estimate(np.subtract(value_S, other_S), np.subtract(replicate_SR, other_SR))

    def paired(self, model: str, other: str, number: Callable[[Result, Result], float]) -> Estimate:
        """A number of two runs from the same seed, over seeds."""
        by_seed = {result.arm.seed: result for result in self.of(other)}
        pairs = [(r, by_seed[r.arm.seed]) for r in self.of(model) if r.arm.seed in by_seed]
        return estimate([number(*pair) for pair in pairs])


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
    names = ("heldout", "hardness", "other_rules", "items")
    read = {name: measured(folder, name, summary.step, asked.items) for name in names}
    measures = {name: found for name, found in read.items() if found is not None}
    if "heldout" not in measures:
        return None
    metrics = read_metrics(folder)
    reached = reached_experts(folder)
    return Result(arm, arm.settings(asked), summary, metrics, measures, reached)
