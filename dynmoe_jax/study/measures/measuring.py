"""Measures taken of a run, kept in its folder: what is there already is not taken again."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from dynmoe_jax.runs.records import from_json, to_json, write_atomically
from dynmoe_jax.study.measures import MEASURES
from dynmoe_jax.study.measures.trained import opened

FOLDER = "measured"


def measure(workdir: Path, names: Collection[str], items: Path | None) -> None:
    """Takes measures of a trained run that are not there, or out of date.

    Args:
      workdir: the run's folder.
      names: of the measures.
      items: folder of evaluation items.

    Raises:
      ConfigError, DataError, CheckpointError: the run, or the items, cannot be read.
    """
    with opened(workdir, any(MEASURES[name].analyzes for name in names)) as run:
        for name in names:
            if measured(workdir, name, run.step, items) is None:
                record = {
                    "step": run.step,
                    "depends_on": MEASURES[name].depends_on(items),
                    "found": MEASURES[name].take(run, items),
                }
                write_atomically(_path(workdir, name), to_json(record) + "\n")


def measured(workdir: Path, name: str, step: int, items: Path | None) -> dict[str, Any] | None:
    """The record of a measure, or None where it is not there or out of date."""
    path = _path(workdir, name)
    if not path.exists():
        return None
    try:
        record = from_json(path.read_text(encoding="utf-8"))
        if record["step"] == step and record["depends_on"] == MEASURES[name].depends_on(items):
            return record["found"]
    except (ValueError, KeyError, TypeError):
        pass  # damaged: taken again
    return None


def missing(
    workdir: Path, names: Collection[str], model: str, step: int, items: Path | None
) -> list[str]:
    """Names of measures that have to be taken of a run of a model."""
    return [
        name
        for name in names
        if MEASURES[name].is_of(model) and measured(workdir, name, step, items) is None
    ]


def _path(workdir: Path, name: str) -> Path:
    return workdir / FOLDER / f"{name}.json"
