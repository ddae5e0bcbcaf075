"""How long a run takes to leave once it gets SIGTERM.

    python -m benchmarks.stop_seconds --stops=10
    python -m benchmarks.stop_seconds --stops=3 --large

Starts the small runs of the kill campaign (or a model of 100M parameters, 1.2 GB of state), and
sends the signal at a moment drawn within the time of a checkpoint after the first one was begun,
so that some come while one is being written.  Printed: seconds from the signal to the end of the
process, in which the step that is under way comes to its end, the checkpoint before is finished,
another one is written, and the process ends.
"""

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.command import run
from benchmarks.kill_campaign import write_corpus
from benchmarks.kill_victim import ROOT
from dynmoe_jax.command_line import EXIT_PREEMPTED

LARGE = {
    "model.num_layers": 6,
    "model.width": 512,
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.head_width": 64,
    "model.moe.num_experts": 10,
    "model.moe.hidden_width": 1024,
    "train.batch_size": 4,
    "checkpoint.every_steps": 20,
}


def seconds_to_leave(
    arguments: list[str], workdir: Path, within: float, draw: random.Random
) -> tuple[float, bool]:
    """(seconds from SIGTERM to the end, whether a checkpoint was being written) of one run."""
    process = subprocess.Popen(
        [sys.executable, "train.py", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        while not _checkpoints(workdir, "*"):
            if process.poll() is not None:
                raise RuntimeError(f"The run ended by itself: {process.stdout.read()}")
            time.sleep(0.01)
        time.sleep(draw.uniform(0, within))
        saving = bool(_checkpoints(workdir, "*.orbax-checkpoint-tmp"))
        begin = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate()
        seconds = time.perf_counter() - begin
    step = re.search(r"Stopped after step ([\d,]+) and saved", printed)
    if process.returncode != EXIT_PREEMPTED or not step:
        raise RuntimeError(f"The run left with exit code {process.returncode}: {printed}")
    if not _checkpoints(workdir, step[1].replace(",", "")):
        raise RuntimeError(f"The checkpoint of step {step[1]} is missing.")
    return seconds, saving


def _checkpoints(workdir: Path, pattern: str) -> list[Path]:
    return list((workdir / "checkpoints").glob(pattern))


def main() -> None:
    """Stops runs, one after the other, and prints the seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=10, help="runs that are stopped")
    parser.add_argument("--large", action="store_true", help="100M parameters")
    parser.add_argument("--within", type=float, help="seconds, from which the moment is drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    within, draw = asked.within or (25.0 if asked.large else 2.0), random.Random(asked.seed)
    found: list[tuple[float, bool]] = []
    with tempfile.TemporaryDirectory(prefix="stop_seconds_") as name:
        folder = Path(name)
        arguments = [
            "--config=benchmarks/kill_config.py",
            f"--config.data.sources=text:{write_corpus(folder / 'corpus', documents=100)}",
            f"--config.train.compilation_cache={folder / 'compiled'}",
            "--config.train.steps=1000000",
            "--config.evaluation.every_steps=0",
            "--config.checkpoint.keep_best=0",
        ]
        if asked.large:
            arguments += [f"--config.{path}={value}" for path, value in LARGE.items()]
        for number in range(asked.stops):
            found.append(seconds_to_leave(arguments, folder / str(number), within, draw))
            seconds, saving = found[-1]
            print(f"{seconds:6.2f} s{', while a checkpoint was written' * saving}", flush=True)
    seconds = [seconds for seconds, _ in found]
    print(
        f"{len(found)} stops, {sum(saving for _, saving in found)} while a checkpoint was written: "
        f"median {statistics.median(seconds):.2f} s, most {max(seconds):.2f} s"
    )


if __name__ == "__main__":
    run(main)
