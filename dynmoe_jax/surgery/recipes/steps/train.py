"""Step of a recipe: a training run."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.surgery.recipes.step import (
    STEPS,
    Place,
    Price,
    Result,
    Step,
    files_of,
    model_of,
)
from dynmoe_jax.surgery.size import size_of

FLOPS = 5e10
"""FLOPs of a second of training on two cores, where nothing was measured yet."""

START_SECONDS = 30.0
"""Seconds of starting, compiling, evaluating, writing the report."""


@STEPS.register("train")
@dataclasses.dataclass(frozen=True)
class Train(Step):
    """A training run.

    Attributes:
      cfg: its settings.
      start: the step with whose model it begins; None: parameters are drawn.
      reference: the step whose held-out losses are those that ``config.data.reweighting`` compares
        with.
    """

    cfg: config.Config
    start: Step | None = None
    reference: Step | None = None

    @property
    def needs(self) -> tuple[Step, ...]:
        """The steps that it begins with, and that it is compared with on the way."""
        return tuple(step for step in (self.start, self.reference) if step is not None)

    @functools.cached_property
    def settings(self) -> config.Config:
        """The run's settings, with the model that it ends with."""
        return config.settings_at(self._begun, self.cfg.train.steps)

    @functools.cached_property
    def _begun(self) -> config.Config:
        """The run's settings, with the model of what it begins with."""
        if self.start is None:
            return self.cfg
        return dataclasses.replace(self.cfg, model=model_of(self.start, self.name).model)

    def facts(self) -> Mapping[str, Any]:
        """Settings that differ from their defaults (others may come with another version), and
        which text there is."""
        files = files_of(self.cfg.data.sources)
        changed = {name: value for name, value, _ in config.differences(self.cfg)}
        return changed | ({"files": files} if files else {})

    @functools.cached_property
    def _stages(self) -> list[tuple[int, float]]:
        """(step after which they begin, FLOPs of a step) of the models of a run that grows."""
        begun = self._begun
        found = []
        for begin in (0, *config.growth_steps(begun.train)):
            cfg = config.settings_at(begun, begin + 1)
            tokens = cfg.train.batch_size * cfg.data.seq_len
            rows = [tokens * m.route.bounds(m.num_experts).expected for m in cfg.model.moe_settings]
            found.append((begin, training_flops(cfg.model, tokens, cfg.data.seq_len, rows)))
        return found

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of all steps, with as many experts as routers expect."""
        begins, flops = zip(*self._stages, strict=True)
        ends = (*begins[1:], self.cfg.train.steps)
        lengths = (end - begin for begin, end in zip(begins, ends, strict=True))
        return sum(steps * each for steps, each in zip(lengths, flops, strict=True))

    def with_flops(self, flops: float) -> "Train":
        """The same for as many steps as so many FLOPs pay for, at least one.

        A model that grows does so at the same steps, and has the rest as the largest.
        """
        begin, of_step = self._stages[-1]
        before = self.flops - (self.cfg.train.steps - begin) * of_step
        steps = begin + max(1, round((flops - before) / of_step))
        train = dataclasses.replace(self.cfg.train, steps=steps)
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, train=train))

    def price(self) -> Price:
        """FLOPs of all steps; parameters and two moments stay on disk."""
        if self.cfg.train.init_from:
            raise config.ConfigError(
                f"config.train.init_from={self.cfg.train.init_from!r} has no effect in a recipe; "
                "name the step that it begins with as start."
            )
        if self.reference is not None and not self.cfg.data.reweighting:
            raise config.ConfigError(
                f"the reference {self.reference.name} has no effect while config.data.reweighting="
                "''; name a rule, or leave it out."
            )
        stored = 3 * size_of(self.settings).stored_bytes
        return Price(self.flops, START_SECONDS + self.flops / FLOPS, stored)

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """Settings, with the places of text and of the model to begin with."""
        cfg = self.cfg
        data = dataclasses.replace(cfg.data, directory=cfg.data.directory or str(text))
        if self.reference is not None:
            rule = getattr(data, data.reweighting)
            rule = dataclasses.replace(rule, reference=str(place(self.reference)))
            data = dataclasses.replace(data, **{data.reweighting: rule})
        begins = "" if self.start is None else str(place(self.start))
        train = dataclasses.replace(cfg.train, init_from=begins)
        return {"settings": config.to_dict(dataclasses.replace(cfg, data=data, train=train))}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Trains, or goes on."""
        from dynmoe_jax.jobs.serve import wait_for
        from dynmoe_jax.training.trainer import train

        wait_for(folder)
        return train(config.from_config_dict(job["settings"]), folder)

    def is_done(self, folder: Path) -> bool:
        """Whether it is trained to its end."""
        summary = read_summary(folder)
        return bool(summary and summary.complete)

    def share_done(self, folder: Path) -> float:
        """Part of the steps that is done."""
        lines = read_metrics(folder)
        return min(1.0, lines[-1]["step"] / self.cfg.train.steps) if lines else 0.0

    def result(self, folder: Path) -> Result:
        """Figures of its summary."""
        summary = read_summary(folder)
        held, sample = summary.heldout, summary.sample
        curve = tuple(
            (line["step"], line["heldout_bits_per_byte"])
            for line in read_metrics(folder)
            if "heldout_bits_per_byte" in line
        )
        return Result(
            held.bits_per_byte,
            None,
            {name: domain.bits_per_byte for name, domain in held.domains.items()},
            held.experts_per_token,
            curve,
            summary.parameters,
            summary.active_parameters,
            sample and (sample.prompt, sample.text),
            summary.paths.get("report", ""),
            f"{self.cfg.train.steps:,} steps",
        )
