"""Step of a recipe: an operation on the models of other steps, or on models that are there."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.fields import check_value, idle_settings
from dynmoe_jax.surgery.operation import OPERATIONS, Operation
from dynmoe_jax.surgery.recipes.step import (
    STEPS,
    Place,
    Price,
    Result,
    Step,
    files_of,
    model_of,
)
from dynmoe_jax.surgery.report.page import FILE_NAME as PAGE
from dynmoe_jax.surgery.report.provenance import read_record
from dynmoe_jax.surgery.request import Options, Request, check_count
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.surgery.storage.parent import opened_parent

START_SECONDS, BYTES_A_SECOND = 25.0, 5e7
"""Seconds of starting, measuring and drawing a page, and how fast arrays are made, roughly."""


@STEPS.register("operate")
@dataclasses.dataclass(frozen=True)
class Operate(Step):
    """An operation.

    Attributes:
      operation: which, with its settings.
      parents: steps whose models it takes, or models that are there: folders, or GGUF files, from
        the folder that the command is started in.
      options: settings that all operations share.
    """

    operation: Operation
    parents: tuple[Step | Path, ...]
    options: Options = dataclasses.field(default_factory=Options)

    @property
    def needs(self) -> tuple[Step, ...]:
        """Its parents that are steps."""
        return tuple(parent for parent in self.parents if isinstance(parent, Step))

    @property
    def _name(self) -> str:
        return Request(self.operation, (), Path()).name

    @functools.cached_property
    def settings(self) -> config.Config:
        """Settings of the result; nothing but settings of models that are there is read."""
        found = []
        for parent in self.parents:
            if isinstance(parent, Step):
                found.append(model_of(parent, self.name))
            else:
                with opened_parent(parent) as there:
                    found.append(there.config)
        return self.operation.result(found)

    def facts(self) -> Mapping[str, Any]:
        """Operation, settings and options that differ from their defaults (others may come with
        another version), which text there is, which models and at what place."""
        there = [None if isinstance(p, Step) else _absolute(p) for p in self.parents]
        files = files_of(self.options.data) if self.options.data else []
        return {
            "operation": self._name,
            "settings": _changed(self.operation),
            "options": _changed(self.options),
            "parents": there if any(there) else [],
            **({"files": files} if files else {}),
        }

    def price(self) -> Price:
        """Bytes by arithmetic; moments are counted as carried where they would be."""
        self._check()
        roles = 3 if self.options.moments == "carry" and self.needs else 1
        stored = roles * size_of(self.settings, self.options.dtype).stored_bytes
        return Price(0.0, START_SECONDS + stored / BYTES_A_SECOND, stored)

    def _check(self) -> None:
        """Raises ConfigError for settings that a command line would not take either."""
        for group in (self.operation, self.options):
            idle = idle_settings(type(group), vars(group))
            for field in dataclasses.fields(group):
                value = getattr(group, field.name)
                check_value(field.name, field, value, prefix="--")
                if field.name in idle and value != field.default:
                    other = idle[field.name]
                    raise config.ConfigError(
                        f"--{field.name}={value} has no effect with --{other}="
                        f"{getattr(group, other)}; leave it out."
                    )
        check_count(Request(self.operation, self.parents, Path()))

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """The request."""
        folders = [str(place(p)) if isinstance(p, Step) else _absolute(p) for p in self.parents]
        return {**self.facts(), "parents": folders}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Performs it."""
        from dynmoe_jax.surgery.perform import perform

        operation = OPERATIONS[job["operation"]](**job["settings"])
        parents = tuple(Path(parent) for parent in job["parents"])
        perform(Request(operation, parents, folder, Options(**job["options"])))
        return 0

    def result(self, folder: Path) -> Result:
        """Figures of its record."""
        record = read_record(folder)
        after, samples = record["after"], record["samples"]["texts"]
        sample = samples and (samples[0]["prompt"], samples[0]["after"]["text"])
        exact = record["exact"]["measured"]
        bits, before = after["heldout_bits_per_byte"], record["before"]["heldout_bits_per_byte"]
        domains = record["compared"]["domains"]
        # What was added is added to a step's model, where the first parent is one.
        of_step = isinstance(self.parents[0], Step)
        return Result(
            bits,
            bits - before if of_step else None,
            {n: x["bits_after"] - of_step * x["bits_before"] for n, x in domains.items()},
            after["experts_per_token"],
            (),
            after["parameters"],
            after["active_parameters"],
            sample or None,
            PAGE,
            f"logits differ by {exact:.2g} of the largest",
        )


def _changed(settings: Operation | Options) -> dict[str, Any]:
    """Settings that differ from their defaults, by name."""
    values = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return {field.name: value for field, value in values if value != field.default}


def _absolute(path: Path) -> str:
    return os.path.abspath(os.path.expanduser(path))
