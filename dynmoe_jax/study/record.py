"""The record of a study, ``study.json``."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.study.plan import Arm, Request
from dynmoe_jax.study.questions import QUESTIONS
from dynmoe_jax.study.results import Results

FILE_NAME = "study.json"


def make_record(asked: Request, arms: list[Arm]) -> dict[str, Any]:
    """Everything that the page shows, from what lies in the folders of the runs."""
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
                "tables": [table.record() for table in question.tables(results)],
                "data": question.data(results),
            }
        )
    return {
        "size": asked.size,
        "command": " ".join(["python -m dynmoe_jax.study", *sys.argv[1:]]),
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
        "seconds": sum(result.seconds for result in results.all),
        "models": [result.record() for result in results.all],
        "answers": answers,
        "questions": sections,
    }


def write_record(workdir: Path, record: dict[str, Any]) -> Path:
    """Writes ``study.json``; returns its path."""
    path = workdir / FILE_NAME
    write_atomically(path, to_json(record, indent=1) + "\n")
    return path
