"""One start of ``train.py``, killed in a phase of its life, or left to come to its end."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = {
    # What the run prints, or makes, when a phase begins; and seconds within which it is killed.
    "preparation": (r"^Reading documents|^Reusing", 1.5),
    "compile": (r"^Compiling", 2.5),
    "steps": (r"^step ", 3.0),
    "saving": (None, 0.1),
    "results": (r"^step +(\d+)/\1 ", 2.0),
}
_PATIENCE_S = 300


@dataclasses.dataclass(frozen=True)
class Start:
    """What became of one start.

    Attributes:
      phase: in which it was killed; None if it came to its end first.
      resumed: the step that it went on after; None if it did not get to say so.
      exit_code: of the process; -9 if it was killed.
      output: what it printed.
    """

    phase: str | None
    resumed: int | None
    exit_code: int
    output: str


def start(
    arguments: list[str], workdir: Path, cache: Path, phase: str | None, draw: random.Random
) -> Start:
    """Starts a run and kills it (SIGKILL) in ``phase``; None lets it go on to its end.

    A run that comes to its end before the phase, or before the moment that was drawn in it, was
    not killed: see :class:`Start`.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "train.py", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = _Output(process.stdout)
    saves = draw.randrange(8)
    killed = phase is not None and _reach(process, seen, workdir, phase, saves)
    if killed:
        time.sleep(draw.uniform(0, PHASES[phase][1]))
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
    exit_code = process.wait(_PATIENCE_S)
    seen.thread.join()
    found = re.search(r"after step ([\d,]+), on ", seen.text)
    resumed = (
        int(found[1].replace(",", "")) if found else (0 if "New run in" in seen.text else None)
    )
    return Start(phase if killed else None, resumed, exit_code, seen.text)


def _reach(
    process: subprocess.Popen, seen: "_Output", workdir: Path, phase: str, saves: int
) -> bool:
    """Waits for the phase (saving: after ``saves`` others); False if the process ends first."""
    pattern, begun = PHASES[phase][0], set()
    while process.poll() is None:
        if pattern is None:
            begun.update((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
            if len(begun) > saves:
                return True
        elif re.search(pattern, seen.text, re.MULTILINE):
            return True
        time.sleep(0.001)
    return False


class _Output:
    """What a process prints, read while it runs."""

    def __init__(self, stream):
        self.text = ""
        self.thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.thread.start()

    def _read(self, stream) -> None:
        for line in stream:
            self.text += line
