"""Step of a recipe: the ensemble of the models of several steps, on held-out text."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.inference.ensemble.members import FLAG, RECORD, UNIFORM
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.surgery.recipes.step import STEPS, Place, Price, Result, Step, model_of
from dynmoe_jax.surgery.recipes.steps.train import FLOPS
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.surgery.storage.target import written_whole

START_SECONDS = 20.0
"""Seconds of starting, and of drawing a page."""

_DOMAINS = 3
"""Domains of text, which nobody counts before it is read."""


@STEPS.register("ensemble")
@dataclasses.dataclass(frozen=True)
class Ensemble(Step):
    """Evaluation of an ensemble, on the text that the training of its first member evaluates.

    It makes no model: what it costs is paid for each token that is read or written
    (``flops_per_token`` of ``ensemble.json``).

    Attributes:
      members: trainings whose models they are.
      prior: ``uniform``; or ``estimate``, by domain, from text that is then not evaluated.
      top_k: members that keep their weight at each token; 0: all.
    """

    members: tuple[Step, ...]
    prior: str = UNIFORM
    top_k: int = 0

    @property
    def needs(self) -> tuple[Step, ...]:
        """Its members."""
        return self.members

    def facts(self) -> Mapping[str, Any]:
        """The way members are weighed."""
        return {"prior": self.prior, "top_k": self.top_k}

    def price(self) -> Price:
        """Seconds of a forward pass of every member; no training."""
        if len({member.key for member in self.members}) < max(2, len(self.members)):
            raise config.ConfigError(f"{self.name} needs two members or more, each named once.")
        models = self._models
        if not 0 <= self.top_k <= len(models):
            raise config.ConfigError(
                f"top_k={self.top_k} must be from 1 to the {len(models)} members, or 0 for all."
            )
        first = models[0]
        rows = first.evaluation.max_batches * first.train.batch_size * _DOMAINS
        flops = rows * first.data.seq_len * sum(size_of(cfg).flops_per_token for cfg in models)
        return Price(seconds=START_SECONDS * len(models) + flops / FLOPS)

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """The command line."""
        folders = ",".join(str(place(member)) for member in self.members)
        flags = f"{FLAG}={folders}", f"--prior={self.prior}", f"--ensemble_top_k={self.top_k}"
        return {"arguments": list(flags)}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Evaluates into a folder that is there when all of it is."""
        from dynmoe_jax.evaluation.__main__ import evaluate, parsed

        with written_whole(folder) as unfinished:
            return evaluate(parsed([*job["arguments"], f"--output={unfinished}"]))

    def result(self, folder: Path) -> Result:
        """Figures of its record; all members are active in every token."""
        from dynmoe_jax.evaluation.ensemble.page import FILE_NAME

        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Result(
            record["all"]["bits_per_byte"],
            None,
            {name: domain["bits_per_byte"] for name, domain in record["domains"].items()},
            parameters=record["parameters"],
            active_parameters=sum(size_of(cfg).active_parameters for cfg in self._models),
            page=FILE_NAME,
            note=f"{compact(record['flops_per_token'])} FLOPs a token",
        )

    @property
    def _models(self) -> list[config.Config]:
        return [model_of(member, self.name) for member in self.members]
