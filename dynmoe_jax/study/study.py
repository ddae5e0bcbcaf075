"""The study, told from top to bottom: text, an estimate, runs, measures, answers, the page."""

import json
from collections.abc import Sequence

from rich.markup import escape

from dynmoe_jax import config
from dynmoe_jax.console import console, titled_table
from dynmoe_jax.data import DataError, prepare
from dynmoe_jax.jobs.workers import Workers
from dynmoe_jax.runs.disk import disk_errors
from dynmoe_jax.runs.formatting import duration
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.runs.text import load_text
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import Arm, Request, arms_of
from dynmoe_jax.study.measures.items import tasks_in
from dynmoe_jax.study.page import write_page
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.questions.question import SILENT
from dynmoe_jax.study.record import FILE_NAME, make_record, write_record
from dynmoe_jax.study.running.jobs import jobs_of, left_of, timed

REQUEST = "request.json"
TEXT = "text.sha256"
LOGS = "logs"
WORKER = "dynmoe_jax.study.running.worker"


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
        if left := left_of(asked, arms):
            flags = asked.of_size.xla_flags
            with Workers(WORKER, asked.processes, workdir / LOGS, arguments, flags) as workers:
                domains = _prepare(asked)
                costs = timed(asked, workers)
                jobs = jobs_of(asked, left, costs, domains)
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
