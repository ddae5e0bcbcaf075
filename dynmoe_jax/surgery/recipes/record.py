"""Record of a recipe: ``recipe.json``, from which its page is drawn."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.surgery.recipes.recipe import EXACT, Asked, Comparison, Plan
from dynmoe_jax.surgery.recipes.step import Place, Result, Step
from dynmoe_jax.surgery.recipes.steps.train import Train
from dynmoe_jax.surgery.report.provenance import versions

FILE_NAME = "recipe.json"
CONFIDENCE = 0.95


def make_record(plan: Plan, asked: Asked, seconds: Mapping[str, float], place: Place) -> dict:
    """The record of a recipe all of whose steps are done.

    Args:
      plan: its steps.
      asked: how it was asked for.
      seconds: of steps, by the name of the folder.
      place: folder of a step.

    Raises:
      CheckpointError: a step's folder has been damaged since.
    """
    results = _results(plan, place)
    steps = [_step(plan, key, results, seconds, place) for key in plan.steps]
    return {
        "title": plan.title,
        "about": plan.about,
        "file": str(asked.file),
        "size": asked.size,
        "seeds": asked.seeds,
        "data": asked.sources,
        "steps": steps,
        "comparisons": _comparisons(plan, results),
        "seconds": {"steps": sum(step["seconds"] or 0.0 for step in steps)},
        "versions": versions(),
    }


def _results(plan: Plan, place: Place) -> dict[str, Result]:
    """Results by key, all on the text of trainings.

    Operations measure on less text: what they have added there is added to what the model that they
    began with has on all of it.
    """
    found: dict[str, Result] = {}
    for key, step in plan.steps.items():
        result = _result(step, place(step))
        if result.bits_added is not None and step.needs:
            result = _added_to(found[step.needs[0].key], result)
        found[key] = result
    return found


def _result(step: Step, folder: Path) -> Result:
    try:
        return step.result(folder)
    except Exception as error:  # files that are gone, empty or half there fail in all ways
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"What {step.kind} {step.name} has left in {folder} cannot be read ({why}); remove "
            "that folder, and the same command does the step again."
        ) from error


def _added_to(base: Result, result: Result) -> Result:
    """A result with what it has added, added to another one."""
    bits = base.bits_per_byte + result.bits_added
    by_domain = {
        name: base.by_domain[name] + added
        for name, added in result.by_domain.items()
        if name in base.by_domain
    }
    return dataclasses.replace(result, bits_per_byte=bits, by_domain=by_domain)


def _step(plan: Plan, key: str, results, seconds, place: Place) -> dict[str, Any]:
    step, result = plan.steps[key], results[key]
    folder = place(step)
    own, all_flops = step.price().flops, plan.flops(step)
    return {
        "name": step.name,
        "kind": step.kind,
        "key": key,
        "seed": plan.seed_of(step),
        "needs": [need.key for need in step.needs],
        "folder": folder.name,
        "seconds": seconds.get(folder.name),
        "flops": own,
        "all_flops": all_flops,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "curve": _curve(step, results, all_flops - own, own),
        **{name: value for name, value in dataclasses.asdict(result).items() if name != "curve"},
    }


def _curve(step, results, before: float, own: float) -> list[tuple[float, float]]:
    """(FLOPs spent so far, bits per byte), those of all that it needs counted.

    A training that begins with a model begins at that model's point.
    """
    result = results[step.key]
    if not isinstance(step, Train):
        return [(before, result.bits_per_byte)] if math.isfinite(result.bits_per_byte) else []
    points = [(before, results[need.key].bits_per_byte) for need in step.needs]
    points += [(before + own * n / step.cfg.train.steps, bits) for n, bits in result.curve]
    if not points or points[-1][0] < before + own:
        points.append((before + own, result.bits_per_byte))
    return points


def _comparisons(plan: Plan, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Every question, over seeds."""
    return [
        _comparison(plan, [recipe.compared[i] for recipe in plan.recipes], results)
        for i in range(len(plan.recipes[0].compared))
    ]


def _comparison(plan: Plan, seeds: list[Comparison], results) -> dict[str, Any]:
    first = seeds[0]
    pairs = [(_figure(results[c.model.key], c), _figure(results[c.than.key], c)) for c in seeds]
    differences = np.array([mine - other for mine, other in pairs])
    half = math.nan
    if len(differences) > 1:
        t = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
        half = float(t * differences.std(ddof=1) / np.sqrt(len(differences)))
    mean, flops = float(differences.mean()), [plan.flops(c) for c in (first.model, first.than)]
    return {
        "model": first.model.name,
        "than": first.than.name,
        "by": first.by,
        "difference": mean,
        "half": half,
        "better": _better(first, differences),
        "seeds": len(pairs),
        "flops": flops,
        "sentence": _sentence(first, mean, half, differences, flops),
    }


def _figure(result: Result, comparison: Comparison) -> float:
    """The figure that is compared."""
    if comparison.by == EXACT:
        return result.exact.get("all", math.nan)
    return result.bits_per_byte


def _better(comparison: Comparison, differences) -> int:
    """Seeds from which the model is better: less bits, more exact responses."""
    sign = -1 if comparison.by == EXACT else 1
    return int((sign * differences < 0).sum())


def _sentence(first: Comparison, mean: float, half: float, differences, flops) -> str:
    name, other = (step.name.replace("_", " ") for step in (first.model, first.than))
    if not math.isfinite(mean):
        missing = "scores of responses" if first.by == EXACT else "bits per byte"
        return f"{name} and {other} do not both have {missing}."
    word = "less" if mean < 0 else "more"
    said = f"{name} has {decimals(abs(mean), 4)} bits per byte {word} than {other}"
    if first.by == EXACT:
        said = (
            f"{name} matches a share of {decimals(abs(mean), 4)} of responses {word} than {other}"
        )
    if math.isfinite(half):
        # Of what the sentence calls less or more, so that both have one sign.
        low, high = abs(mean) - half, abs(mean) + half
        better = _better(first, differences)
        said += (
            f" ({decimals(low, 4)} to {decimals(high, 4)}, {100 * CONFIDENCE:g} %; better from "
            f"{better} of {len(differences)} seeds)"
        )
        if low <= 0 <= high:
            said += ", which these seeds do not decide"
    else:
        said += ", from one seed"
    # A model that is there, and what an operation makes of it, cost none.
    return (
        f"{said}; at {decimals(flops[0] / flops[1], 2)} of its FLOPs." if flops[1] else f"{said}."
    )


def write_record(workdir: Path, record: Mapping[str, Any]) -> Path:
    """Writes ``recipe.json`` atomically; returns its path."""
    path = workdir / FILE_NAME
    write_atomically(path, to_json(record, indent=2) + "\n")
    return path
