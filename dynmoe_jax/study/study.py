"""The study, told from top to bottom: text, an estimate, runs, measures, answers, the page."""

import dataclasses
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape

from dynmoe_jax import config
from dynmoe_jax.console import console, titled_table
from dynmoe_jax.data import DataError, prepare
from dynmoe_jax.runs.disk import disk_errors
from dynmoe_jax.runs.formatting import decimals, duration
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import Arm, Request, arms_of, summary_of
from dynmoe_jax.study.measures.items import tasks_in
from dynmoe_jax.study.measures.measuring import missing
from dynmoe_jax.study.page import write_page
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.questions.question import SILENT
from dynmoe_jax.study.record import FILE_NAME, make_record, write_record
from dynmoe_jax.study.running.estimate import Costs, Timing, models_to_time
from dynmoe_jax.study.running.workers import Job, Workers

REQUEST = "request.json"
TEXT = "text.sha256"
LOGS = "logs"


def study(asked: Request, arguments: Sequence[str] = ()) -> int:
    """Trains, measures and answers, as far as that is not done yet; returns the exit code.

    Args:
      asked: the request.
      arguments: of the command lines of workers, such as plug-ins.

    Raises:
      ConfigError, DataError, CheckpointError, DiskError: with one sentence for the user.
    """
    # ── What is asked, and whether it can be ─────────────────────────────────────────────────────
    workdir = asked.workdir
    arms = arms_of(asked)
    if asked.items:
        tasks_in(asked.items)
    workdir.mkdir(parents=True, exist_ok=True)
    with disk_errors(workdir), locked(workdir):
        _check_same(asked)
        _announce(asked, arms)

        # ── Text and tokenizer, the same for all; then runs and measures ─────────────────────────
        if left := _left(asked, arms):
            flags = asked.of_size.xla_flags
            with Workers(asked.processes, workdir / LOGS, arguments, flags) as workers:
                domains = _prepare(asked)
                costs = _timed(asked, workers)
                jobs = _jobs(asked, left, costs, domains)
                seconds = sum(job.cost for job in jobs) / asked.processes
                console.print(
                    f"{len(left)} of {len(arms)} runs are left to train or to measure, about "
                    f"{duration(seconds)} by a few steps that were timed. Ctrl-C saves and stops; "
                    "the same command continues.",
                    markup=False,
                    soft_wrap=True,
                )
                workers.run(jobs, "study")

        # ── Answers ──────────────────────────────────────────────────────────────────────────────
        record = make_record(asked, arms, arguments)
        write_record(workdir, record)
        page = write_page(workdir, record)
    _show(record)
    console.print(f" numbers   {workdir / FILE_NAME}", soft_wrap=True, markup=False)
    console.print(f" page      {page}", soft_wrap=True, markup=False)
    return 0


def _check_same(asked: Request) -> None:
    """Raises ConfigError if another study was begun in the folder."""
    path = asked.workdir / REQUEST
    facts = {"size": asked.size, "data": asked.sources, "rates": list(asked.learning_rates)}
    if path.exists():
        begun = json.loads(path.read_text(encoding="utf-8"))
        for name, flag in (("size", "size"), ("data", "data"), ("rates", "learning_rates")):
            if begun[name] != facts[name]:
                shown = ",".join(f"{x:g}" for x in begun[name]) if name == "rates" else begun[name]
                raise config.ConfigError(
                    f"--workdir={asked.workdir} holds a study with --{flag}={shown}; give the "
                    "same, or another --workdir."
                )
    write_atomically(path, json.dumps(facts) + "\n")


def _announce(asked: Request, arms: list[Arm]) -> None:
    """Says what will be answered."""
    table = titled_table(f"Study of size {asked.size}: {asked.of_size.about}")
    table.add_column("")
    table.add_column("question")
    for number in asked.questions:
        table.add_row(str(number), QUESTIONS[number].title)
    console.print(table)
    models = ", ".join(MODELS[name].title for name in asked.models)
    console.print(
        f"{len(arms)} runs: {models}; {asked.seeds} seed{'s' * (asked.seeds > 1)}.",
        markup=False,
        soft_wrap=True,
    )


def _prepare(asked: Request) -> int:
    """Prepares text and tokenizer unless they are there; returns the number of domains.

    Raises:
      DataError: the text is not that of the runs that are there.
    """
    if asked.tokenizer:
        prepared = prepare(asked.base.data, asked.workdir / "data")
    else:
        prepared, _ = load_text(asked.base, asked.workdir, None)
    path = asked.workdir / TEXT
    if path.exists() and path.read_text(encoding="utf-8") != prepared.content:
        raise DataError(
            f"--data={asked.base.data.sources} gives other documents than those that the runs in "
            f"{asked.workdir} were trained on; bring those back, or name another --workdir."
        )
    write_atomically(path, prepared.content)
    return len(prepared.domains)


def _left(asked: Request, arms: list[Arm]) -> list[Arm]:
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


def _timed(asked: Request, workers: Workers) -> Costs:
    """Seconds of everything, from a few steps of some models, which are timed one at a time."""
    before, jobs = frozenset(), []
    for name in models_to_time(asked.models, asked.of_size.timed):
        cfg = MODELS[name].settings(asked.base, asked.of_size.wider)
        message = partial(lambda cfg: {"time": config.to_dict(cfg)}, cfg)
        jobs.append(Job(f"timing {MODELS[name].title}", message, 1.0, before))
        before = frozenset({len(jobs) - 1})
    return Costs(Timing(**found) for found in workers.run(jobs, "timing"))


def _jobs(asked: Request, left: list[Arm], costs: Costs, domains: int) -> list[Job]:
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
                    costs.train(shape, arm.model, steps - done),
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


def _show(record: dict) -> None:
    """Answers on a few lines."""
    table = titled_table("Answers")
    for name in ("", "question", "answer", "as in the paper"):
        table.add_column(name)
    for answer in record["answers"]:
        agrees = "–" if answer["paper"] == SILENT else answer["agrees_with_paper"]
        cells = (answer["question"], answer["sentence"], agrees)
        table.add_row(str(answer["number"]), *map(escape, cells))
    console.print()
    console.print(table)
