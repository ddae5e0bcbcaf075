"""Speed of two checkouts, in turns: an MoE layer, a training step, generation, the first step.

    git worktree add ../before 36df81e
    python -m benchmarks.old_and_new --old=../before

Each checkout serves its own cases (of its own ``benchmarks``) from a process of its own; what is
printed is new over old, with the quartiles of the ratios within rounds.  The first step is timed
from the start of ``train.py --config=configs/quickstart.py``, with the old run's tokenizer and
prepared data and no program compiled before.  Exits with 1 if a ratio is above ``LIMIT``.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.checkout import Checkout
from benchmarks.command import run
from benchmarks.machine import pin_threads, with_machine
from benchmarks.timing import Mark, interleave, ratio, show_progress
from benchmarks.worker import Worker
from dynmoe_jax.hardware.huge_pages import environment_for_huge_pages

LIMIT = 1.03
PARTS = ("layer", "step", "generation", "first_step")
IN_A_ROW = {"generation": 1, "first_step": 1}
ROUNDS = {"layer": 15, "step": 9, "generation": 5, "first_step": 3}

CASES = {
    "layer": """
from benchmarks.layer_cases import PRESETS, choices, draw
from benchmarks.moe_layer import jax_cases
preset = PRESETS["cpu"]
chosen = [choices(preset, draw(preset))[name] for name in ("top_2", "top_p_2")]
cases, _ = jax_cases(preset, chosen, ["ours"], ["forward", "train"])
""",
    "step": """
from benchmarks.train_cases import PRESETS, cases as models
from benchmarks.train_jax import TrainCase
preset = PRESETS["cpu"]
cases = {name: TrainCase(preset, models(preset)[name]) for name in ("top_2", "top_p_2")}
""",
    "generation": """
import inspect
from benchmarks.generation import SHAPES, our_cases, our_decoder
shape = SHAPES["smollm2"]
takes_decoder = "decoder" in inspect.signature(our_cases).parameters
decoder = (our_decoder(shape),) if takes_decoder else ()
cases, _ = our_cases(*decoder, shape, [1, 8])
""",
}
SERVE = "from benchmarks.worker import serve\n{}\nserve(cases)\n"


def server(checkout: Checkout, part: str) -> Worker:
    """The process in which a checkout serves the cases of a part."""
    environment = checkout.environment()
    environment = environment_for_huge_pages(environment) or environment
    code = SERVE.format(CASES[part])
    return Worker(checkout.start("-c", code, stdin=subprocess.PIPE, env=environment))


def seconds_to_first_step(checkout: Checkout, prepared: Path) -> float:
    """Seconds from the start of a new run to the line of its first step."""
    with tempfile.TemporaryDirectory() as workdir:
        begin = time.perf_counter()
        process = checkout.start("train.py", *quickstart(Path(workdir), prepared))
        found = any(line.startswith("step ") for line in process.stdout)
        seconds = time.perf_counter() - begin
        process.kill()
        process.communicate()
    if not found:
        sys.exit(f"{checkout.root}: train.py has ended before its first step.")
    return seconds


def quickstart(workdir: Path, prepared: Path) -> list[str]:
    """Arguments of a new run on data that is there."""
    return [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.data.tokenizer={prepared / 'tokenizer.model'}",
        f"--config.data.directory={prepared / 'data'}",
        "--config.train.compilation_cache=none",
        "--config.train.log_every_steps=1",
    ]


def prepare(checkout: Checkout, folder: Path) -> None:
    """A run of one step, for its tokenizer and data."""
    short = ("--config.train.steps=1", "--config.evaluation.max_batches=1")
    arguments = ("--config=configs/quickstart.py", f"--workdir={folder}", *short)
    checkout.run("train.py", *arguments)


def measure(old: Checkout, new: Checkout, part: str, rounds: int) -> dict:
    """Seconds of each round by ``old/case`` and ``new/case``."""
    checkouts = {"old": old, "new": new}
    if part == "first_step":
        with tempfile.TemporaryDirectory() as prepared:
            prepare(old, Path(prepared))
            runs = {
                f"{age}/{part}": lambda c=checkout: seconds_to_first_step(c, Path(prepared))
                for age, checkout in checkouts.items()
            }
            return interleave(runs, rounds, show_progress(rounds))
    servers = {age: server(checkout, part) for age, checkout in checkouts.items()}
    runs = {
        f"{age}/{name}": lambda w=worker, n=name: w.seconds(n)
        for name in servers["new"].names
        for age, worker in servers.items()
    }
    found = interleave(runs, rounds, show_progress(rounds), IN_A_ROW.get(part, 2))
    for worker in servers.values():
        worker.close()
    return found


def main() -> None:
    """Prints new over old by case; exits with 1 if one is slower than allowed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, required=True, help="root of the other checkout")
    parser.add_argument("--new", type=Path, default=Path(), help="root of this one")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, help="of each part; by default by its length")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    asked = parser.parse_args()
    pin_threads(asked.threads)
    old, new = Checkout(asked.old.resolve()), Checkout(asked.new.resolve())
    seconds = {}
    for part in asked.parts.split(","):
        seconds |= measure(old, new, part, asked.rounds or ROUNDS[part])
    names = [name.removeprefix("new/") for name in seconds if name.startswith("new/")]
    marks = [
        Mark(f"{name}, new / old", LIMIT, ratio(seconds[f"new/{name}"], seconds[f"old/{name}"]))
        for name in names
    ]
    for name, mark in zip(names, marks, strict=True):
        print(f"{mark}   (old: {np.nanmedian(seconds[f'old/{name}']):.4g} s)")
    result = {"seconds": {name: list(values) for name, values in seconds.items()}}
    with_machine("benchmarks.old_and_new", result, asked.json)
    sys.exit(not all(mark.met for mark in marks))


if __name__ == "__main__":
    run(main)
