"""Jobs of a study: runs to train and to measure, each behind what it needs."""

import dataclasses
import math
from functools import partial
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.jobs.workers import Job, Workers
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import Arm, Request, summary_of
from dynmoe_jax.study.measures.measuring import missing
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.running.estimate import Costs, Timing, models_to_time


def left_of(asked: Request, arms: list[Arm]) -> list[Arm]:
    """Runs that are not complete, or of which a measure is missing, those that failed aside."""
    may = [arm for arm in arms if not arm.failure(asked)]
    return [arm for arm in may if not arm.is_complete(asked) or _missing(asked, arm)]


def _missing(asked: Request, arm: Arm) -> list[str]:
    if arm.rate is not None:  # its loss is read from its summary, to choose a rate
        names = ["heldout"]
    else:
        read = (QUESTIONS[number].measures for number in asked.questions)
        names = dict.fromkeys(name for measures in read for name in measures)
    summary = summary_of(arm, asked)
    step = summary.step if summary else -1
    return missing(arm.folder(asked), names, arm.model, step, asked.items)


def timed(asked: Request, workers: Workers) -> Costs:
    """Seconds of everything, from a few steps of some models, which are timed one at a time."""
    before, jobs = frozenset(), []
    for name in models_to_time(asked.models, asked.of_size.timed):
        cfg = MODELS[name].settings(asked.base, asked.of_size.wider)
        message = partial(lambda cfg: {"time": config.to_dict(cfg)}, cfg)
        jobs.append(Job(f"timing {MODELS[name].title}", message, 1.0, before))
        before = frozenset({len(jobs) - 1})
    return Costs(Timing(**found) for found in workers.run(jobs, "timing"))


def jobs_of(asked: Request, left: list[Arm], costs: Costs, domains: int) -> list[Job]:
    """Training and measuring of all runs that are left, each behind what it needs."""
    jobs: list[Job] = []
    number_of: dict[Arm, int] = {}
    for arm in left:
        model = MODELS[arm.model]
        shape = model.settings(asked.base, asked.of_size.wider)
        steps = max(1, shape.train.steps // 2) if model.ablation else shape.train.steps
        train = dataclasses.replace(shape.train, steps=steps)
        shape = dataclasses.replace(shape, train=train)
        needs = frozenset(number_of[n] for n in arm.needs(asked) if n in number_of)
        title = f"{model.title}, seed {arm.seed}"
        title += f", rate {arm.rate:g}" if arm.rate else ""
        if not arm.is_complete(asked):
            number_of[arm] = len(jobs)
            done = _step_of(arm.folder(asked))
            jobs.append(
                Job(
                    f"training {title}",
                    partial(_training, asked, arm),
                    costs.train(shape, steps - done),
                    needs,
                    partial(_share_done, arm.folder(asked), done, steps),
                    partial(_told, asked, arm, title),
                )
            )
        if names := _missing(asked, arm):
            needs = frozenset({number_of[arm]} if arm in number_of else ())
            message = partial(_measuring, asked, arm, names)
            cost = costs.measure(shape, arm.model, names, domains)
            jobs.append(Job(f"measuring {title}", message, cost, needs))
    return jobs


def _training(asked: Request, arm: Arm) -> dict | None:
    if arm.failure(asked):
        return None
    folder = arm.folder(asked).absolute()
    return {"train": str(folder), "settings": config.to_dict(arm.settings(asked))}


def _measuring(asked: Request, arm: Arm, names: list[str]) -> dict | None:
    if arm.failure(asked):
        return None
    items = str(asked.items.absolute()) if asked.items else None
    return {"measure": str(arm.folder(asked).absolute()), "names": names, "items": items}


def _step_of(folder: Path) -> int:
    """Step of the newest line of a run's log."""
    lines = read_metrics(folder)
    return lines[-1]["step"] if lines else 0


def _share_done(folder: Path, first: int, steps: int) -> float:
    """Part of the steps from a first one on that are done."""
    return min(1.0, max(0.0, (_step_of(folder) - first) / max(1, steps - first)))


def _told(asked: Request, arm: Arm, title: str) -> str:
    if why := arm.failure(asked):
        return f"{title} gives no result: {why}"
    heldout = summary_of(arm, asked).heldout
    said = f"{title}: {decimals(heldout.bits_per_byte, 3)} bits per byte"
    mean = heldout.experts_per_token
    return said + (f", {decimals(mean, 2)} experts per token" if math.isfinite(mean) else "")
