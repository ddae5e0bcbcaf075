"""A recipe, told from top to bottom: its steps, what is left of them, text, work, the page."""

import contextlib
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.markup import escape

from dynmoe_jax.console import console, titled_table
from dynmoe_jax.jobs.workers import Job, Workers
from dynmoe_jax.runs.disk import disk_errors, not_writable
from dynmoe_jax.runs.formatting import clock, compact, decimals, duration
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.surgery.measuring.statistics import FOLDER as STATISTICS
from dynmoe_jax.surgery.recipes.page import write_page
from dynmoe_jax.surgery.recipes.recipe import Asked, Plan, planned
from dynmoe_jax.surgery.recipes.record import FILE_NAME, make_record, write_record
from dynmoe_jax.surgery.recipes.step import STEPS_FOLDER, Price, Step
from dynmoe_jax.surgery.storage.target import UNFINISHED, remove_unfinished

TEXT, LOGS, SECONDS = "data", "logs", "seconds.jsonl"
WORKER = "dynmoe_jax.surgery.recipes.worker"


def run_recipe(asked: Asked, arguments: Sequence[str] = ()) -> int:
    """Does what is not done yet of a recipe, and writes the page over all of it.

    Args:
      asked: the recipe.
      arguments: of the command lines of workers, such as plug-ins.

    Returns:
      the exit code.

    Raises:
      ConfigError, DataError, CheckpointError, DiskError: with one sentence for the user.
    """
    # ── Which steps there are, and which are done ────────────────────────────────────────────────
    begin = time.perf_counter()
    plan, workdir = planned(asked), asked.workdir.absolute()
    try:
        for folder in (workdir, workdir / STEPS_FOLDER, workdir / LOGS):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(workdir, error) from error
    with disk_errors(workdir), locked(workdir):
        remove_unfinished(workdir / STEPS_FOLDER)
        left = [step for step in plan.steps.values() if not step.is_done(_folder(workdir, step))]
        show_steps(plan, workdir)
        _say_others(plan, workdir)

        # ── What is left, each behind what it needs ──────────────────────────────────────────────
        if left:
            processes = min(asked.processes, len(left))
            seconds = sum(step.price().seconds for step in left) / processes
            console.print(
                f"{len(left)} of {len(plan.steps)} steps are left, about {duration(seconds)} by "
                "arithmetic. Ctrl-C saves and stops; the same command continues.",
                markup=False,
                soft_wrap=True,
            )
            with Workers(WORKER, processes, workdir / LOGS, arguments) as workers:
                workers.run(_jobs(left, workdir), "recipe")

        # ── The page ─────────────────────────────────────────────────────────────────────────────
        record = make_record(plan, asked, _seconds(workdir), partial(_folder, workdir))
        record["seconds"]["command"] = time.perf_counter() - begin
        write_record(workdir, record)
        page = write_page(workdir, record)
    _show_comparisons(record)
    console.print(f" numbers   {workdir / FILE_NAME}", soft_wrap=True, markup=False)
    console.print(f" page      {page}", soft_wrap=True, markup=False)
    return 0


def _folder(workdir: Path, step: Step) -> Path:
    return workdir / STEPS_FOLDER / step.folder_name


def _jobs(left: Sequence[Step], workdir: Path) -> list[Job]:
    numbers = {step.key: number for number, step in enumerate(left)}
    return [
        Job(
            f"{step.kind} {step.name}",
            partial(_message, step, workdir),
            step.price().seconds,
            frozenset(numbers[need.key] for need in step.needs if need.key in numbers),
            partial(step.share_done, _folder(workdir, step)),
            partial(_told, step, workdir),
            partial(_keep_seconds, step, workdir),
        )
        for step in left
    ]


def _message(step: Step, workdir: Path) -> dict:
    place = partial(_folder, workdir)
    job = step.message(place, workdir / TEXT)
    return {"kind": step.kind, "folder": str(place(step)), "job": job}


def _told(step: Step, workdir: Path) -> str:
    found = step.result(_folder(workdir, step))
    bits = found.bits_per_byte
    figures = f": {decimals(bits, 3)} bits per byte" if bits == bits else ""
    return f"{step.kind} {step.name}{figures}" + (f" ({found.note})" if found.note else "")


# ── Seconds ──────────────────────────────────────────────────────────────────────────────────────


def _keep_seconds(step: Step, workdir: Path, seconds: float) -> None:
    """Adds a line for a step that a worker has brought to its end."""
    line = json.dumps({"step": step.folder_name, "seconds": seconds})
    with (workdir / SECONDS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _seconds(workdir: Path) -> dict[str, float]:
    """Seconds by folder of a step: of the last time, of one that somebody has removed between."""
    found: dict[str, float] = {}
    if (workdir / SECONDS).exists():
        for line in (workdir / SECONDS).read_bytes().splitlines():
            # Its writer was stopped in the middle of it, or the disk has damaged it.
            with contextlib.suppress(ValueError, TypeError, LookupError):
                kept = json.loads(line)
                found[kept["step"]] = float(kept["seconds"])
    return found


# ── On the terminal ──────────────────────────────────────────────────────────────────────────────


def show_steps(plan: Plan, workdir: Path | None = None) -> None:
    """Prints all steps with their price, and with their state where there is a folder."""
    table = titled_table(escape(plan.title))
    several = len(plan.recipes) > 1
    names = ["", *["seed"] * several, "step", "of", *_NUMBERS, *["state"] * (workdir is not None)]
    for name in names:
        # Names of steps are those of folders, and stay whole on narrow terminals: what a step is
        # made of is told by numbers, and lines break between words.
        justify = "right" if name in ("", *_NUMBERS) else "left"
        table.add_column(name, justify=justify, no_wrap=name not in ("step", "of"), overflow="fold")
    numbers = {key: number for number, key in enumerate(plan.steps, 1)}
    prices = [step.price() for step in plan.steps.values()]
    for (key, step), price in zip(plan.steps.items(), prices, strict=True):
        table.add_row(
            str(numbers[key]),
            *([plan.seed_of(step)] if several else []),
            f"{step.kind} {step.name}",
            ", ".join(str(numbers[need.key]) for need in step.needs) or "–",
            *_row(price),
            *([] if workdir is None else [_state(step, _folder(workdir, step))]),
        )
    table.add_section()
    table.add_row("", *[""] * several, "all", "", *_row(sum(prices, Price())))
    console.print(table)


_NUMBERS = ("FLOPs", "MB", "time")


def _row(price: Price) -> list[str]:
    return [
        compact(price.flops) if price.flops else "–",
        f"{price.stored_bytes / 1e6:,.1f}" if price.stored_bytes else "–",
        clock(price.seconds),
    ]


def _state(step: Step, folder: Path) -> str:
    if step.is_done(folder):
        return "done"
    return "begun" if folder.exists() else "to do"


def _say_others(plan: Plan, workdir: Path) -> None:
    """Says what is there of steps that the recipe does not have."""
    known = {STATISTICS, *(step.folder_name for step in plan.steps.values())}
    folder = workdir / STEPS_FOLDER
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if others := [name for name in there if name not in known and UNFINISHED not in name]:
        console.print(
            "Of other recipes, or of another form of this one, left alone in "
            f"{folder}: {', '.join(others)}.",
            markup=False,
            soft_wrap=True,
        )


def _show_comparisons(record: dict) -> None:
    for said in record["comparisons"]:
        console.print(said["sentence"], markup=False, soft_wrap=True)
