"""Kills training at random moments, again and again, and compares what comes out in the end.

    python -m benchmarks.kill_campaign --kills=50

One run is never disturbed.  Others, of the same settings, are killed with SIGKILL: the phase
(preparation, compile, steps, saving, results) is drawn for each start, then the moment within it.
After ``--kills-per-run`` kills a run may come to its end, and the next one begins.  Every start
must go on from the newest complete checkpoint; every finished run must have the parameters, the
optimizer's state, the lines of metrics.jsonl and the held-out results of the undisturbed one, bit
for bit.  The exit code is 1 if anything differs.
"""

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.command import run
from benchmarks.kill_victim import PHASES, Start, start
from dynmoe_jax.console import console
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary

TIMES = ("tokens_per_second", "model_flops_per_second", "mfu", "seconds_step")
_WORDS = "the a token chooses its experts router mass passes until while self return of 数据 é ="


def write_corpus(folder: Path, documents: int) -> str:
    """Made-up text files; returns their glob."""
    draw = random.Random(0)
    folder.mkdir()
    for number in range(documents):
        words = draw.choices(_WORDS.split(), k=draw.randint(50, 600))
        invented = [
            f"{word}{draw.randint(0, 99)}" if draw.random() < 0.1 else word for word in words
        ]
        (folder / f"{number}.txt").write_text(" ".join(invented), encoding="utf-8")
    return f"{folder}/*.txt"


def newest_checkpoint(workdir: Path) -> int:
    """Step of the newest folder that Orbax has given its final name; 0 without one."""
    folders = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in folders if path.name.isdigit()), default=0)


def last_step(workdir: Path) -> int:
    """The last step that metrics.jsonl knows of."""
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by its path, read without the package."""
    folder = (workdir / "checkpoints" / str(newest_checkpoint(workdir)) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        leaves = reader.metadata(folder).item_metadata.tree
        # Not as JAX's arrays: those of several processes have devices that are not here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        tree = reader.restore(folder, restore_args=as_numpy)
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(workdir: Path, undisturbed: Path) -> list[str]:
    """What a finished run has otherwise than the undisturbed one."""
    found = []
    state, wanted = state_of(workdir), state_of(undisturbed)
    if state.keys() != wanted.keys():
        found.append("the arrays of the checkpoint have other names")
    found += [
        f"{name} differs"
        for name in state.keys() & wanted.keys()
        if state[name].tobytes() != wanted[name].tobytes()
    ]
    lines, wanted_lines = (
        [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]
        for folder in (workdir, undisturbed)
    )
    if [line["step"] for line in lines] != [line["step"] for line in wanted_lines]:
        found.append("metrics.jsonl has other steps")
    elif lines != wanted_lines:
        found.append("metrics.jsonl has other numbers")
    one, other = read_summary(workdir), read_summary(undisturbed)
    if (one.heldout, one.sample) != (other.heldout, other.sample):
        found.append("summary.json has other results")
    left = [path.name for path in workdir.rglob("*") if "orbax-checkpoint-tmp" in path.name]
    left += [path.name for path in (workdir / "data").glob("unfinished-*")]
    return found + [f"{name} was left behind" for name in left]


class Campaign:
    """Counts what happens to the runs."""

    def __init__(self, kills: int, draw: random.Random, folder: Path, arguments: list[str]):
        self.wanted, self.draw, self.folder, self.arguments = kills, draw, folder, arguments
        self.kills: collections.Counter[str] = collections.Counter()
        self.resumes = self.runs = self.steps_lost = self.most_lost = 0
        self.problems: list[str] = []

    def run(self, workdir: Path, kills: int) -> None:
        """One run from its beginning to its end, killed up to so many times."""
        self.runs += 1
        while not (workdir / "summary.json").exists():
            before, reached = newest_checkpoint(workdir), last_step(workdir)
            phase = None
            if kills > 0 and self.kills.total() < self.wanted:
                # Once there is a checkpoint, nothing is prepared any more.
                phase = self.draw.choice([p for p in PHASES if not before or p != "preparation"])
            got = start(self.arguments, workdir, self.folder / "cache", phase, self.draw)
            self._check(workdir, got, before, reached)
            if got.phase:
                kills -= 1
                self.kills[got.phase] += 1
                self._show(workdir, got)
            elif got.exit_code:
                break

    def _check(self, workdir: Path, got: Start, before: int, reached: int) -> None:
        if got.exit_code not in (0, -9) or "Traceback" in got.output:
            self.problems.append(f"{workdir.name}: exit code {got.exit_code}: {got.output[-2000:]}")
        if got.resumed is None:
            return
        if got.resumed != before:
            self.problems.append(f"{workdir.name}: step {before} was saved, not {got.resumed}")
        if before or reached:
            self.resumes += bool(before)
            self.steps_lost += max(0, reached - got.resumed)
            self.most_lost = max(self.most_lost, reached - got.resumed)

    def _show(self, workdir: Path, got: Start) -> None:
        console.print(
            f"{workdir.name}: kill {self.kills.total():>3}/{self.wanted} in {got.phase:<11}  "
            f"newest checkpoint {newest_checkpoint(workdir):>4}  last step {last_step(workdir):>4}",
            markup=False,
        )

    def result(self) -> dict:
        """The figures."""
        return {
            "kills": self.kills.total(),
            "by_phase": dict(self.kills),
            "runs": self.runs,
            "resumes": self.resumes,
            "steps_lost": self.steps_lost,
            "most_steps_lost_by_a_kill": self.most_lost,
            "differences": len(self.problems),
            "problems": self.problems,
        }


def main() -> int:
    """Runs the campaign, prints its figures and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--kills-per-run", type=int, default=10, help="before a run may end")
    parser.add_argument("--steps", type=int, default=120, help="length of each run")
    parser.add_argument("--seed", type=int, default=0, help="of phases and moments")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    asked = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill_campaign_") as name:
        folder, draw = Path(name), random.Random(asked.seed)
        sources = write_corpus(folder / "corpus", documents=400)
        arguments = [
            "--config=benchmarks/kill_config.py",
            f"--config.data.sources=text:{sources}",
            f"--config.train.steps={asked.steps}",
        ]
        undisturbed = folder / "undisturbed"
        console.print("The undisturbed run …")
        quiet = start(arguments, undisturbed, folder / "cache", None, draw)
        if quiet.exit_code:
            sys.exit(f"The undisturbed run failed:\n{quiet.output}")
        campaign = Campaign(asked.kills, draw, folder, arguments)
        while campaign.kills.total() < asked.kills and not campaign.problems:
            workdir = folder / f"run_{campaign.runs}"
            campaign.run(workdir, asked.kills_per_run)
            if not campaign.problems:
                found = differences(workdir, undisturbed)
                campaign.problems += [f"{workdir.name}: {what}" for what in found]
    figures = {**campaign.result(), "seed": asked.seed, "seconds": time.perf_counter() - began}
    for name, value in figures.items():
        console.print(f"{name:<26} {value}", markup=False)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(bool(campaign.problems))


if __name__ == "__main__":
    run(main)
