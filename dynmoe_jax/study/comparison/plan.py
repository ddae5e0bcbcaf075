"""Runs that a study needs, and the settings of each."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import Summary, read_summary
from dynmoe_jax.study.comparison.asked import Asked
from dynmoe_jax.study.comparison.models import BUDGET, MODELS, changed
from dynmoe_jax.study.comparison.sizes import SIZES, Size

COMPARED = "dynamic"
"""The model that ablations are compared with, whose learning rate they take."""

FAILED = "failed.txt"
"""File in the folder of a run that ended for bad numbers, and says why."""

LAST_SHARE = 0.1
"""Part of training, its end, whose mean experts per token a model is said to reach."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Request for a study, as the command line makes it.

    Attributes:
      size: name of the size.
      workdir: the study's folder.
      seeds: how many.
      models: names of those that are trained, ablations aside.
      questions: numbers of those that are answered.
      sources: of text; empty: the size's own.
      items: folder of evaluation items, if there is one.
      learning_rates: a grid of them, of which each model takes the best; empty: the size's own.
      processes: runs that are trained side by side.
    """

    size: str
    workdir: Path
    seeds: int
    models: tuple[str, ...] = tuple(name for name, m in MODELS.items() if not m.ablation)
    questions: tuple[int, ...] = tuple(Asked)
    sources: str = ""
    items: Path | None = None
    learning_rates: tuple[float, ...] = ()
    processes: int = 1

    @property
    def all_models(self) -> tuple[str, ...]:
        """Models of the comparison, and the ablations that are asked for."""
        if Asked.ABLATIONS not in self.questions:
            return self.models
        chosen = self.of_size.ablations
        ablations = [name for name, m in MODELS.items() if m.ablation]
        return *self.models, *(n for n in ablations if chosen is None or n in chosen)

    @property
    def of_size(self) -> Size:
        """The size."""
        return SIZES[self.size]

    @property
    def base(self) -> config.Config:
        """Settings that all runs share, those of MoE-Dynamic."""
        return _base(self, self.tokenizer)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer of all runs, once it is there."""
        names = (self.workdir / name for name in ("tokenizer.model", "tokenizer"))
        return next((path for path in names if path.exists()), None)


@functools.cache
def _base(asked: Request, tokenizer: Path | None) -> config.Config:
    changes = {
        "data.directory": str(asked.workdir.absolute() / "data"),
        "train.compilation_cache": str(asked.workdir.absolute() / "compiled"),
    }
    if asked.sources:
        changes["data.sources"] = asked.sources
    if tokenizer:
        changes["data.tokenizer"] = str(tokenizer.absolute())
    return changed(asked.of_size.shared(), changes)


@dataclasses.dataclass(frozen=True, order=True)
class Arm:
    """One run of a study.

    Attributes:
      model: name of the model.
      seed: of parameters and of the order of the data.
      rate: learning rate, where it is one of a grid; None: the best of the grid, or the size's own.
    """

    model: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Its folder below that of all runs."""
        of_grid = "" if self.rate is None else f"-rate-{self.rate:g}"
        return f"{self.model}{of_grid}/{self.seed}"

    def folder(self, asked: Request) -> Path:
        """Folder of the run."""
        return asked.workdir / "runs" / self.name

    def needs(self, asked: Request) -> tuple["Arm", ...]:
        """Runs that must be complete before its settings are known."""
        found = []
        if self.rate is None and asked.learning_rates:
            found += grid_of(asked, COMPARED if MODELS[self.model].ablation else self.model)
        if source := MODELS[self.model].budget_of:
            seed = self.seed if self.rate is None else 0
            found.append(Arm(source, seed))
        return tuple(found)

    def settings(self, asked: Request) -> config.Config:
        """All settings of the run; what it needs is complete."""
        base, size, model = asked.base, asked.of_size, MODELS[self.model]
        changes = {"seed": self.seed}
        if model.budget_of:
            source = Arm(model.budget_of, self.seed).folder(asked)
            changes[BUDGET] = round(reached_experts(source, base.train), 3)
        if model.ablation:
            changes["train.steps"] = max(1, base.train.steps // 2)
        if rate := self.rate or self._best_rate(asked):
            changes["optimizer.learning_rate"] = rate
        return changed(model.settings(base, size.wider), changes)

    def _best_rate(self, asked: Request) -> float | None:
        grid = [arm for arm in self.needs(asked) if arm.rate is not None]
        return min(grid, key=lambda arm: _loss_of(arm, asked)).rate if grid else None

    def is_complete(self, asked: Request) -> bool:
        """Whether it is trained to its end."""
        summary = summary_of(self, asked)
        return bool(summary and summary.complete)

    def failure(self, asked: Request) -> str:
        """Says why it has no result and gets none; empty where it may have one."""
        if (path := self.folder(asked) / FAILED).exists():
            return path.read_text(encoding="utf-8").strip()
        needed = self.needs(asked)
        grid = [arm for arm in needed if arm.rate is not None]
        if grid and all(arm.failure(asked) for arm in grid):
            return "no learning rate of the grid gave a model."
        for arm in needed:
            if arm.rate is None and arm.failure(asked):
                return f"{arm.name}, which it is made of, failed."
        return ""


def _loss_of(arm: Arm, asked: Request) -> float:
    """Held-out loss of a run; infinite of one that has none."""
    summary = summary_of(arm, asked)
    loss = summary.heldout.loss if summary else math.inf
    return loss if math.isfinite(loss) else math.inf


def arms_of(asked: Request) -> list[Arm]:
    """All runs in the order in which they are trained: grids, then seed by seed, ablations last."""
    found = [arm for model in asked.models for arm in grid_of(asked, model)]
    found += [Arm(model, seed) for seed in range(asked.seeds) for model in asked.models]
    found += [Arm(model, 0) for model in asked.all_models if model not in asked.models]
    # A budget stands behind what it is taken from, also where that was named after it.
    return [*dict.fromkeys(arm for each in found for arm in (*_sources(each, asked), each))]


def _sources(arm: Arm, asked: Request) -> Iterator[Arm]:
    for needed in arm.needs(asked):
        yield from _sources(needed, asked)
        yield needed


def grid_of(asked: Request, model: str) -> list[Arm]:
    """Runs of a model from seed 0 with every learning rate of the grid."""
    return [Arm(model, 0, rate) for rate in asked.learning_rates]


def summary_of(arm: Arm, asked: Request) -> Summary | None:
    """Summary of a run, if it is there."""
    return read_summary(arm.folder(asked))


def logged_lines(folder: Path, train: config.Train) -> list[dict[str, Any]]:
    """The log of a run as one that never stopped writes it.

    A run that is continued logs its first step besides.
    """
    every, last = train.log_every_steps, train.steps
    return [x for x in read_metrics(folder) if not x["step"] % every or x["step"] in (1, last)]


def reached_experts(folder: Path, train: config.Train) -> float:
    """Mean experts per token of a run in the last part of training; NaN where there is none."""
    lines, first = logged_lines(folder, train), (1 - LAST_SHARE) * train.steps
    last = [line["experts_per_token"] for line in lines if line["step"] > first]
    return sum(last) / len(last) if last else math.nan
