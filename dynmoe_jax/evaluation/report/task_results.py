"""Results of an evaluation: one record, from which tables, page and files are made."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax.evaluation.expert_use import ExpertUse, TaskUse
from dynmoe_jax.runs.records import to_json, write_atomically

FILE_NAME = "results.json"
# What a task is judged by, the first that it has.
_METRICS = ("acc", "exact_match", "word_perplexity", "perplexity", "bits_per_byte")


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Result of one task, or of one group of tasks.

    Attributes:
      items: that were asked.
      metric: what ``value`` is, as the harness calls it.
      value: mean over the items, or what the metric is.
      stderr: of ``value``; NaN where the harness gives none.
      normalized: accuracy by log p per byte of the answer; NaN where the task has none.
      experts: per token, of its requests.
    """

    items: int
    metric: str
    value: float
    stderr: float
    normalized: float
    experts: TaskUse


def collect(
    found: Mapping[str, Any], names: Mapping[str, list[str]], experts: ExpertUse
) -> dict[str, TaskResult]:
    """The results of the tasks that were asked for.

    Args:
      found: what the harness returns.
      names: the harness's names of what was asked for, by the name it was asked for with.
      experts: of all requests.
    """
    return {
        asked if len(parts) == 1 else part: _result(found, part, experts)
        for asked, parts in names.items()
        for part in parts
    }


def _result(found: Mapping[str, Any], name: str, experts: ExpertUse) -> TaskResult:
    figures = found["results"][name]
    metric, key = _metric(figures)
    members = _members(found, name)
    name_of, _, filtered = key.partition(",")
    return TaskResult(
        items=sum(found["n-samples"][member]["effective"] for member in members),
        metric=metric,
        value=_number(figures.get(key)),
        stderr=_number(figures.get(f"{name_of}_stderr,{filtered}")),
        normalized=_number(figures.get(f"{metric}_norm,{filtered}")),
        experts=experts.together(members),
    )


def _members(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a group consists of; of a task, itself."""
    parts = found.get("group_subtasks", {}).get(name) or []
    return [leaf for part in parts for leaf in _members(found, part)] if parts else [name]


def _metric(figures: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, its key): keys are ``METRIC,FILTER``."""
    keys = [key for key in figures if "," in key and "_stderr" not in key]
    for metric in _METRICS:
        for key in keys:
            if key.split(",")[0] == metric:
                return metric, key
    return (keys[0].split(",")[0], keys[0]) if keys else ("–", "")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def write_results(
    folder: Path,
    found: Mapping[str, Any],
    results: Mapping[str, TaskResult],
    extra: Mapping[str, Any],
) -> Path:
    """Writes ``results.json`` and, for each task, ``samples_TASK.jsonl``.

    Both have the harness's own form; ``results.json`` has ``experts_per_token`` besides, and what
    ``extra`` holds.

    Returns:
      the path of the results.
    """
    samples = found.get("samples", {})
    whole = {name: part for name, part in found.items() if name != "samples"}
    whole["experts_per_token"] = {
        task: {
            "mean": result.experts.mean,
            "by_layer": result.experts.by_layer,
            "tokens": result.experts.tokens,
        }
        for task, result in results.items()
        if result.experts.tokens
    }
    path = folder / FILE_NAME
    # Functions and the like, of which the harness writes the source or the name.
    plain = json.loads(json.dumps({**whole, **extra}, default=str))
    write_atomically(path, to_json(plain, indent=2) + "\n")
    for task, lines in samples.items():
        text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        write_atomically(folder / f"samples_{task}.jsonl", text)
    return path
