"""Process that trains and measures runs of a study, one after another.

    python -m dynmoe_jax.study.running.worker LOG [--plugin=FILE …]

reads jobs from standard input, a JSON object a line, and answers each by a line.  Everything else
that it says goes to the file LOG.  It ends when standard input does: whoever gives the jobs has
ended then, and a run that is under way saves and stops.

A job is ``{"train": folder, "settings": …}``, ``{"measure": folder, "names": …, "items": …}`` or
``{"time": settings}``; the answer ``{"code": …, "found": …}`` or ``{"error": sentence}``.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from dynmoe_jax import command_line, config
from dynmoe_jax.console import console
from dynmoe_jax.runs.lock import FILE_NAME as LOCK
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.records import to_json, write_atomically
from dynmoe_jax.study.comparison.plan import FAILED

PATIENCE_S = 60.0
"""Seconds to wait for a run that another process still saves."""


def work(jobs: Iterator[dict[str, Any]], answers: TextIO) -> int:
    """Does jobs until there are no more, or it is asked to stop; returns the exit code."""
    from dynmoe_jax.training.health.rescue import BadNumbers
    from dynmoe_jax.training.trainer import BAD_INPUT

    for job in jobs:
        try:
            answer = _do(job)
        except BadNumbers as error:  # a result of its own: another try would end alike
            write_atomically(Path(job["train"]) / FAILED, f"{error}\n")
            answer = {"code": 0}
        except (config.ConfigError, *BAD_INPUT) as error:
            answer = {"error": str(error)}
        answers.write(to_json(answer) + "\n")
        answers.flush()
        if answer.get("code"):
            return int(answer["code"])
    return 0


def _do(job: dict[str, Any]) -> dict[str, Any]:
    if "train" in job:
        from dynmoe_jax.training.trainer import train

        folder = Path(job["train"])
        _wait_for(folder)
        return {"code": train(config.from_config_dict(job["settings"]), folder)}
    if "measure" in job:
        from dynmoe_jax.study.measures.measuring import measure

        measure(Path(job["measure"]), job["names"], job["items"] and Path(job["items"]))
        return {"code": 0}
    from dynmoe_jax.study.running.estimate import time_steps

    return {"code": 0, "found": time_steps(config.from_config_dict(job["time"]))}


def _wait_for(folder: Path) -> None:
    """Waits until nobody trains in a folder: what a killed study has begun may still save."""
    end = time.monotonic() + PATIENCE_S
    while (folder / LOCK).exists() and time.monotonic() < end:
        try:
            with locked(folder):
                return
        except config.ConfigError:
            time.sleep(0.5)


def _listen(jobs: queue.Queue) -> None:
    """Passes on lines of standard input; its end stops what is under way."""
    for line in sys.stdin:
        jobs.put(json.loads(line))
    jobs.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


def _separated(log: Path) -> TextIO:
    """Standard output as it was, for answers; from now on whatever is printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    return answers


def main() -> int:
    """Returns the exit code."""
    answers = _separated(Path(sys.argv[1]))
    # Between jobs nothing has to be saved.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(command_line.EXIT_PREEMPTED))
    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    console.print(f"Worker {os.getpid()} of a study", markup=False)
    return command_line.exit_code(lambda: work(iter(jobs.get, None), answers))


if __name__ == "__main__":
    sys.exit(main())
