"""The machine a benchmark runs on: threads, versions, copy bandwidth."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PACKAGES = ("jax", "jaxlib", "torch", "transformers", "numpy")


def pin_threads(threads: int) -> None:
    """Keeps this process and its children on the first ``threads`` cores that it may use.

    JAX sizes its thread pool by the cores that it may use, PyTorch by ``OMP_NUM_THREADS``; both
    read them as they start, so this comes before either is imported.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def describe(module: str) -> dict[str, str]:
    """Processor, cores used, versions, date and command: what a figure needs beside it.

    Args:
      module: the benchmark, as ``python -m`` calls it.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "?"),
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": f"python -m {module} {shlex.join(sys.argv[1:])}",
    }


def with_machine(module: str, figures: dict, path: Path | None) -> dict:
    """The figures of a benchmark with the machine that they are of; also in ``path``, if given."""
    result = {"machine": describe(module), **figures}
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


class Copy:
    """Copies ``num_bytes`` from one buffer to another, with all threads; a case for timing."""

    def __init__(self, num_bytes: int, threads: int):
        self.source = np.ones(num_bytes // 8)
        self.target = np.zeros_like(self.source)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self) -> float:
        """Seconds.  As STREAM counts, 2 ``num_bytes`` pass: read once, written once."""
        pairs = zip(
            np.array_split(self.target, self.threads),
            np.array_split(self.source, self.threads),
            strict=True,
        )
        begin = time.perf_counter()
        list(self.pool.map(lambda pair: np.copyto(*pair), pairs))
        return time.perf_counter() - begin
