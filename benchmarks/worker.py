"""Cases that run in a process of their own, timed there and called from here.

PyTorch and JAX each bring a thread pool that spins; in one process they would slow each other.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

from dynmoe_jax.hardware.huge_pages import TUNABLES


class WorkerError(RuntimeError):
    """A process has ended early; the message is one sentence, what happened stands above it."""

    exit_code = 1


class Worker:
    """A process whose cases are timed from here.

    Args:
      process: serves the cases, by :func:`serve`; its pipes are of text.

    Attributes:
      names: the cases that it offers.
    """

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.names: list[str] = self._read()

    @classmethod
    def of_module(cls, module: str, *arguments: str, tunables: str = "") -> "Worker":
        """Runs ``python -m MODULE ARGUMENTS``.

        Args:
          module: serves the cases.
          arguments: of its command line.
          tunables: of its C library.  Ours asks for huge pages by itself; others do as they do.
        """
        return cls(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=dict(os.environ) | {TUNABLES: tunables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )

    def seconds(self, name: str) -> float:
        """Runs one case once."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(
                f"`python {' '.join(self.process.args[1:3])}` ended with exit code "
                f"{self.process.wait()}; what it said stands above."
            )
        return json.loads(line)


def serve(cases: Mapping[str, Callable[[], float]]) -> None:
    """The other end: names first, then for every name read the seconds that its case took."""
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        print(json.dumps(cases[line.strip()]()), flush=True)
