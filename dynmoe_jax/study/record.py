"""The record of a study, ``study.json``."""

import dataclasses
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynmoe_jax.fields import shown, walk
from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.study.comparison.plan import Arm, Request
from dynmoe_jax.study.comparison.sizes import SIZES
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.questions.results import Results

FILE_NAME = "study.json"
_OF_TRAINING = ("model.", "loss.", "optimizer.", "data.seq_len", "train.steps", "train.batch_size")
"""Settings in which a study may differ from the paper, by the beginning of their paths."""

_FLAGS = {"sources": "data"}
"""Flags that are called otherwise than what they ask for."""


def make_record(asked: Request, arms: list[Arm], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the page shows, from what lies in the folders of the runs.

    Args:
      asked: the request.
      arms: all runs.
      arguments: of the command besides, such as plug-ins.
    """
    results, base = Results(asked, arms), asked.base
    answers, sections = [], []
    for number in asked.questions:
        question = QUESTIONS[number]
        found = [answer.record(number) for answer in question.answers(results)]
        answers += found
        sections.append(
            {
                "number": number,
                "title": question.title,
                "note": question.note,
                "tables": [table.record() for table in question.tables(results)],
                "data": question.data(results),
            }
        )
    return {
        "size": asked.size,
        "command": command_of(asked, arguments),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "jax": version("jax"),
        },
        "data": {
            "sources": base.data.sources,
            "max_megabytes": base.data.max_megabytes,
            "tokens": results.tokens,
        },
        "seeds": asked.seeds,
        "runs": {"complete": len(results.all), "planned": len(arms)},
        "failed": {arm.name: why for arm in arms if (why := arm.failure(asked))},
        "settings": unlike_the_paper(asked),
        "seconds": sum(result.seconds for result in results.all),
        "models": [result.record() for result in results.all],
        "answers": answers,
        "questions": sections,
    }


def unlike_the_paper(asked: Request) -> list[list[str]]:
    """[setting, value, the paper's value] of MoE-Dynamic, where they differ."""
    paper = {path: (field, value) for path, field, value in walk(SIZES["paper"].shared())}
    found = []
    for path, field, value in walk(asked.base):
        theirs = paper[path][1]
        if value != theirs and path.startswith(_OF_TRAINING):
            found.append([path, str(shown(field, value)), str(shown(field, theirs))])
    return found


def command_of(asked: Request, arguments: Sequence[str] = ()) -> str:
    """The command that asks for the same, whoever asked; arguments as of :func:`make_record`."""
    size = asked.of_size
    usual = Request(asked.size, asked.workdir, size.seeds, processes=size.processes)
    flags = [f"--size={asked.size}", f"--workdir={asked.workdir}"]
    for field in dataclasses.fields(asked):
        value = getattr(asked, field.name)
        if value != getattr(usual, field.name):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            flags.append(f"--{_FLAGS.get(field.name, field.name)}={shown}")
    flags += ["--yes"] if size.ask else []
    return shlex.join(["python", "-m", "dynmoe_jax.study", *flags, *arguments])


def write_record(workdir: Path, record: dict[str, Any]) -> Path:
    """Writes ``study.json``; returns its path."""
    path = workdir / FILE_NAME
    write_atomically(path, to_json(record, indent=1) + "\n")
    return path
