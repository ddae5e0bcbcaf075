"""Programs in processes of their own: seconds, the processor's seconds, and peak memory."""

import dataclasses
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynmoe_jax.hardware.huge_pages import TUNABLES

ROOT = Path(__file__).parents[1]
_LOOK_S = 0.02
"""Seconds between two looks at a process.  Its peak stands in the kernel's books to its end, and is
last read this long before."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """A program that has ended.

    Attributes:
      exit_code: 0 if all went well.
      seconds: from start to end.
      cpu_seconds: of all its threads, in the kernel too.
      peak_bytes: the most that was resident (VmHWM): Python and mapped files included.
      said: all that it printed.
    """

    exit_code: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    said: str

    @property
    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.said.strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {self.exit_code}"


def ran(arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Ran:
    """Runs a program to its end.

    Args:
      arguments: its command line.
      environment: variables that it has besides those of this process.
    """
    with tempfile.TemporaryFile() as said:
        begin, peak = time.perf_counter(), 0
        process = subprocess.Popen(
            [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
        try:
            # Not what wait4 says of the peak: that begins with the memory of this process.
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                peak = max(peak, _peak_of(process.pid))
                time.sleep(_LOOK_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds, (_, status, usage) = time.perf_counter() - begin, ended
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Ran(process.returncode, seconds, cpu_seconds, peak, text)


def ours() -> dict[str, str]:
    """Variables for programs of this project: on the CPU, and with the C library as they set it."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", TUNABLES: ""}


def _peak_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0
