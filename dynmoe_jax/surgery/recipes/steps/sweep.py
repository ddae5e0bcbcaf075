"""Step of a recipe: one model at several efforts, its held-out loss against FLOPs per token."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.runs.records import to_json
from dynmoe_jax.surgery.recipes.step import STEPS, Place, Price, Result, Step, model_of
from dynmoe_jax.surgery.recipes.steps.train import FLOPS
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.surgery.storage.target import written_whole

FILE_NAME = "sweep.json"
START_SECONDS, POINT_SECONDS = 15.0, 10.0
"""Seconds of starting, and of compiling the model for a point, roughly."""


@dataclasses.dataclass(frozen=True)
class Efforts:
    """A line of a sweep: a rule by which tokens choose experts, at several values of a setting.

    Attributes:
      name: of the rule, for people.
      setting: that is varied, one that evaluation may change, such as
        ``model.moe.threshold.tau``.
      values: of it.
      fixed: other settings, by name.
    """

    name: str
    setting: str
    values: tuple[float | int, ...]
    fixed: tuple[tuple[str, str], ...] = ()

    def settings(self) -> list[dict[str, str]]:
        """The settings of each point."""
        return [dict(self.fixed) | {self.setting: str(value)} for value in self.values]


@STEPS.register("sweep")
@dataclasses.dataclass(frozen=True)
class Sweep(Step):
    """Evaluation of one model at several efforts, which no parameter depends on.

    Attributes:
      of: the step whose model it is.
      efforts: lines of the picture; the last one is what the others are compared with.
    """

    of: Step
    efforts: tuple[Efforts, ...]

    @property
    def needs(self) -> tuple[Step, ...]:
        """The step whose model it is."""
        return (self.of,)

    def facts(self) -> Mapping[str, Any]:
        """The lines."""
        return {"efforts": [dataclasses.asdict(line) for line in self.efforts]}

    def price(self) -> Price:
        """Seconds of a forward pass for every point; that its settings can be."""
        cfg = model_of(self.of, self.name)
        points = [point for line in self.efforts for point in line.settings()]
        if not points:
            raise config.ConfigError(f"{self.name} has no efforts; name one or more.")
        for point in points:
            config.with_free_settings(cfg, point)
        flops = len(points) * _tokens_of(cfg) * size_of(cfg).flops_per_token
        return Price(seconds=START_SECONDS + POINT_SECONDS * len(points) + flops / FLOPS)

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """The model, and the lines."""
        return {"from": str(place(self.of)), **self.facts()}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Evaluates every point, into a folder that is there when all of it is."""
        efforts = [
            Efforts(**{**line, "fixed": tuple(map(tuple, line["fixed"]))})
            for line in job["efforts"]
        ]
        lines = [
            {"name": line.name, "points": points}
            for line, points in zip(efforts, _measured(Path(job["from"]), efforts), strict=True)
        ]
        with written_whole(folder) as unfinished:
            (unfinished / FILE_NAME).write_text(to_json({"lines": lines}, indent=1) + "\n")
        return 0

    def result(self, folder: Path) -> Result:
        """The points, and by how much the lines are better than the last one at equal FLOPs."""
        lines = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["lines"]
        found = {
            line["name"]: tuple((p["flops_per_token"], p["bits_per_byte"]) for p in line["points"])
            for line in lines
        }
        *others, control = found
        told = []
        for name in others:
            gain = mean_difference(found[name], found[control])
            if np.isfinite(gain):
                word = "less" if gain < 0 else "more"
                told.append(
                    f"{name}: {abs(gain):.4f} bits per byte {word} than {control} at equal FLOPs"
                )
        return Result(efforts=found, note="; ".join(told))


def mean_difference(
    line: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> float:
    """Mean of what one line has more than another one, over the FLOPs that both have.

    Args:
      line: (FLOPs, bits per byte), in any order; straight between neighbors.
      other: likewise.

    Returns:
      bits per byte; NaN where they have no FLOPs in common.
    """
    (x, y), (other_x, other_y) = (np.array(sorted(each)).T for each in (line, other))
    low, high = max(x[0], other_x[0]), min(x[-1], other_x[-1])
    if not low < high:
        return float("nan")
    at = np.unique(np.clip(np.concatenate([x, other_x]), low, high))
    difference = np.interp(at, x, y) - np.interp(at, other_x, other_y)
    return float(np.trapezoid(difference, at) / (high - low))


def _tokens_of(cfg: config.Config) -> int:
    """Held-out tokens of a domain that a training evaluates, at most."""
    return cfg.evaluation.max_batches * cfg.train.batch_size * cfg.data.seq_len


def _measured(folder: Path, efforts: Sequence[Efforts]) -> list[list[dict[str, Any]]]:
    """Figures of a model at each point of each line, on all held-out text that a training
    evaluates."""
    from dynmoe_jax.model import variable_shapes
    from dynmoe_jax.runs.load import opened_run
    from dynmoe_jax.surgery.measuring.text import Source

    with opened_run(folder) as run:
        cfg = run.config
        own = Path(cfg.data.directory) if cfg.data.directory else None
        text = Source(cfg.data, own).open(folder, run.tokenizer(), cfg.model.vocab_size)
        batches = text.heldout(_tokens_of(cfg) * len(text.prepared.domains))
        params = run.params(variable_shapes(cfg.model))
    bytes_V = text.tokenizer.token_bytes_V
    return [
        [
            {"value": value}
            | _figures(config.with_free_settings(cfg, point), params, batches, bytes_V)
            for value, point in zip(line.values, line.settings(), strict=True)
        ]
        for line in efforts
    ]


def _figures(cfg: config.Config, params, batches, bytes_V: np.ndarray) -> dict[str, float]:
    """Loss, experts and FLOPs of a model with these settings."""
    from dynmoe_jax.evaluation.heldout import evaluate, make_eval_step
    from dynmoe_jax.model import decoder_structure
    from dynmoe_jax.model.flops import forward_flops

    step = make_eval_step(decoder_structure(cfg.model), cfg.loss)
    held = evaluate(step, params, batches, bytes_V)
    rows = held.experts_per_token_by_layer
    return {
        "bits_per_byte": held.bits_per_byte,
        "experts_per_token": float(np.mean(rows)),
        "deviation": _deviation(np.array(held.histogram_by_layer, np.float64)),
        "flops_per_token": forward_flops(cfg.model, 1.0, cfg.data.seq_len, rows),
    }


def _deviation(histogram_NK: np.ndarray) -> float:
    """Standard deviation of the experts of a token, mean over layers."""
    share_NK = histogram_NK / histogram_NK.sum(axis=1, keepdims=True)
    count_K = np.arange(share_NK.shape[1])
    mean_N = share_NK @ count_K
    return float(np.mean(np.sqrt(np.maximum(share_NK @ count_K**2 - mean_N**2, 0.0))))
