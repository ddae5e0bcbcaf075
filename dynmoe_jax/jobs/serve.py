"""Worker process: does jobs that it is given, one after another.

It reads jobs from standard input, a JSON object a line, and answers each by a line:
``{"code": …, "found": …}`` or ``{"error": sentence}``.  Everything else that it says goes to a
file.  It ends when standard input does: whoever gives the jobs has ended then, and a run that is
under way saves and stops.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dynmoe_jax import command_line, config
from dynmoe_jax.console import console
from dynmoe_jax.runs.lock import FILE_NAME as LOCK
from dynmoe_jax.runs.lock import locked
from dynmoe_jax.runs.records import to_json

PATIENCE_S = 60.0
"""Seconds to wait for a run that another process still saves."""

Do = Callable[[dict[str, Any]], dict[str, Any]]
"""Does a job; returns the answer, without ``code`` where all went well."""


def serve(do: Do, bad_input: Callable[[], tuple[type[Exception], ...]], title: str) -> int:
    """Does jobs until there are no more, or it is asked to stop.

    Args:
      do: does one.
      bad_input: gives the exceptions besides ConfigError whose message is for the user; a function,
        because what defines them takes seconds to import.
      title: of the worker in its log.

    Returns:
      the exit code.
    """
    answers = _separated(Path(sys.argv[1]))
    # Between jobs nothing has to be saved.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(command_line.EXIT_PREEMPTED))
    jobs: queue.Queue = queue.Queue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    console.print(f"Worker {os.getpid()} of {title}", markup=False)
    return command_line.exit_code(lambda: _work(iter(jobs.get, None), do, bad_input(), answers))


def _work(jobs: Iterator[dict[str, Any]], do: Do, bad_input, answers: TextIO) -> int:
    for job in jobs:
        try:
            answer = {"code": 0} | do(job)
        except (config.ConfigError, *bad_input) as error:
            answer = {"error": str(error)}
        answers.write(to_json(answer) + "\n")
        answers.flush()
        if answer.get("code"):
            return int(answer["code"])
    return 0


def wait_for(folder: Path) -> None:
    """Waits until nobody trains in a folder: what was killed may still save what it has begun."""
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
