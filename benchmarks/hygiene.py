"""Long runs: does host memory grow with the steps, and how soon does a restart train again?

    python -m benchmarks.hygiene --steps 2000

Memory is the resident set of a process that trains a tiny model with all of the trainer: logging,
and twenty evaluations and checkpoints.  A run that takes memory up to some bound is no run that
takes ever more, so the highest figure of each quarter is shown beside the slope; and the C library
keeps freed memory, so what is in use (given out by it, and objects of Python) is shown, too: a
leak grows there without the noise of the resident set.  Starts as `train.py` does, with its
settings of the C library (`dynmoe_jax/hardware/huge_pages.py`).

The restart is the quickstart, stopped after its first steps and started again by the same command:
seconds from the start of the process to the line of its first step, without and with the compiled
programs of the process before.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.command import run
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages

ROOT = Path(__file__).parents[1]
POINTS = 20
"""How often memory is read: before each evaluation and checkpoint."""


def tiny(steps: int, corpus: Path):
    """A model that takes a millisecond a step."""
    from dynmoe_jax import config

    return config.Config(
        model=config.Model(
            num_layers=1,
            width=16,
            num_heads=1,
            num_kv_heads=1,
            head_width=16,
            vocab_size=300,
            max_seq_len=16,
            moe=config.MoE(num_experts=4, hidden_width=16),
        ),
        data=config.Data(sources=f"text:{corpus}/*.txt", seq_len=16, heldout_fraction=0.2),
        train=config.Train(steps=steps, batch_size=8, log_every_steps=1),
        checkpoint=config.Checkpoint(every_steps=steps // POINTS),
        evaluation=config.Evaluation(every_steps=steps // POINTS, max_batches=2, sample_tokens=4),
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Of this process after some step.

    Attributes:
      step: the step.
      resident: MB in memory.
      in_use: MB that the C library has given out; 0 where it does not tell.
      objects: blocks of memory that Python has given out.
    """

    step: int
    resident: float
    in_use: float
    objects: int

    @classmethod
    def after(cls, step: int) -> "Memory":
        """Reads it now."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return cls(step, resident, _in_use_mb(), sys.getallocatedblocks())


class _MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _in_use_mb() -> float:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0.0
    mallinfo.restype = _MallInfo
    return mallinfo().uordblks / 1e6


def memory_by_step(steps: int) -> list[Memory]:
    """All through one run of the real trainer."""
    from dynmoe_jax.training import trainer

    points = []

    class Watched(trainer.PendingStep):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if self.number % (steps // POINTS) == 0:
                points.append(Memory.after(self.number))

    trainer.PendingStep = Watched
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        random = np.random.default_rng(0)
        for number in range(30):
            words = random.choice(["the", "router", "chooses", "experts", "for", "tokens"], 100)
            (corpus / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train(tiny(steps, corpus), Path(folder) / "run")
    return points


def growth_mb(points: list[Memory]) -> float:
    """MB per thousand steps in the second half of a run: the slope of a straight line."""
    half = points[len(points) // 2 :]
    return 1000 * float(np.polyfit([p.step for p in half], [p.resident for p in half], 1)[0])


def highest_by_quarter(points: list[Memory]) -> list[float]:
    """The highest resident MB in each quarter of a run."""
    return [max(p.resident for p in quarter) for quarter in np.array_split(points, 4)]


def seconds_to_first_step(workdir: Path) -> float:
    """From the start of the process to the line of its first step, after which it is stopped.

    Stopped, not short: the learning rate's schedule is compiled into the step, so a run of another
    number of steps is another program.
    """
    from dynmoe_jax.command_line import EXIT_PREEMPTED

    command = [sys.executable, ROOT / "train.py", f"--workdir={workdir}"]
    command += ["--config.data.max_megabytes=0.5"]
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        found = next(
            (time.perf_counter() for line in process.stdout if line.startswith("step ")), None
        )
        process.send_signal(signal.SIGTERM)
        process.communicate()
    if found is None or process.returncode != EXIT_PREEMPTED:
        raise RuntimeError(f"{command} ended with exit code {process.returncode}.")
    return found - start


@dataclasses.dataclass(frozen=True)
class Restart:
    """Seconds to the first step of a process that goes on from a checkpoint."""

    without: float
    with_programs: float


def restart() -> Restart:
    """Measures both, on the same prepared data and the same checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        seconds_to_first_step(workdir)
        # What the first process left is put aside, and made anew by the second.
        (workdir / "compiled").rename(workdir / "aside")
        without = seconds_to_first_step(workdir)
        return Restart(without, seconds_to_first_step(workdir))


def main() -> None:
    """Prints memory by step, its growth, and both restart times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="tiny steps to train")
    parser.add_argument("--only", choices=("memory", "restart"), help="one of the two")
    asked = parser.parse_args()
    if asked.only != "restart":
        points = memory_by_step(asked.steps)
        for point in points:
            print(
                f"step {point.step:>6,}  resident {point.resident:>7.1f} MB  "
                f"in use {point.in_use:>7.2f} MB and {point.objects:>9,} blocks of Python"
            )
        highest = "  ".join(f"{resident:.1f}" for resident in highest_by_quarter(points))
        print(f"highest by quarter: {highest} MB")
        print(f"growth in the second half: {growth_mb(points):+.2f} MB per 1,000 steps")
    if asked.only != "memory":
        found = restart()
        print(f"restart to first step, without compiled programs: {found.without:.1f} s")
        print(f"restart to first step, with them:                 {found.with_programs:.1f} s")


if __name__ == "__main__":
    restart_with_huge_pages()
    run(main)
