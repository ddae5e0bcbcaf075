"""Recipes: what is lost when they are killed, and what they cost beside their steps.

    python -m benchmarks.recipes --kills=10
    python -m benchmarks.recipes --parts=cost --of=runs/upcycling

- `kills`: a recipe of five steps (--recipe at size tiny, with an export) is done once undisturbed;
  another time, with whatever it has started, it is killed with SIGKILL at --kills random moments.
  Every array of every checkpoint, what was exported and every figure of the record have to be the
  same, seconds aside.
- `cost`: seconds of a whole command over those of its steps: of the undisturbed recipe, or of one
  that was run to its end in one go (--of).
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.command import run
from benchmarks.kill_campaign import state_of
from benchmarks.machine import with_machine
from benchmarks.timing import Mark, Ratio
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.recipes.record import FILE_NAME

ROOT = Path(__file__).parents[1]
PARTS = ("kills", "cost")
LIMIT = 1.03
TIMES = ("seconds", "bytes", "versions", "file")
"""Fields that may differ: bytes count logs, in which seconds stand."""

_RECIPE = '''"""Five steps to kill."""
import dataclasses, runpy
from dynmoe_jax.surgery.recipes import Export

def get_recipe(size, seed, data):
    recipe = runpy.run_path({path!r})["get_recipe"](size, seed, data)
    export = Export("exported", recipe.steps[-1])
    return dataclasses.replace(recipe, steps=(*recipe.steps, export))
'''


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
      ConfigError: it names a part that does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "upcycling.py")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--of", type=Path, metavar="WORKDIR", help="of a recipe that is done")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    asked = parser.parse_args(argv)
    asked.parts = asked.parts.split(",")
    if unknown := [part for part in asked.parts if part not in PARTS]:
        raise ConfigError(f"--parts names {unknown[0]!r}; there are {','.join(PARTS)}.")
    return asked


def start(file: Path, workdir: Path) -> subprocess.Popen:
    """The command, in a process group of its own with its workers."""
    flags = [f"--recipe={file}", f"--workdir={workdir}", "--size=tiny"]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir.parent / f"{workdir.name}.txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dynmoe_jax.surgery", *flags],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def kill_again_and_again(file: Path, workdir: Path, kills: int, seconds: float, seed: int) -> int:
    """Kills a recipe, then lets it come to its end.

    Args:
      file: of the recipe.
      workdir: of it.
      kills: how often, at the most; fewer where it ends before.
      seconds: that it takes undisturbed.
      seed: of the moments.

    Returns:
      how often it was killed.
    """
    draw, done = random.Random(seed), 0
    while done < kills:
        process = start(file, workdir)
        try:
            # The steps that are left take less and less.
            process.wait(timeout=draw.uniform(0.02, 0.6) * seconds)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"killed {done} of {kills}", file=sys.stderr)
    if start(file, workdir).wait():
        raise SystemExit(f"The recipe does not end; see {workdir}.txt")
    return done


def differences(one: Path, other: Path) -> list[str]:
    """Differences between two finished recipes."""
    records = [json.loads((folder / FILE_NAME).read_text()) for folder in (one, other)]
    found = [] if _untimed(records[0]) == _untimed(records[1]) else ["figures of recipe.json"]
    for step in records[0]["steps"]:
        folders = [folder / "steps" / step["folder"] for folder in (one, other)]
        if (folders[0] / "checkpoints").is_dir():
            state, wanted = map(state_of, folders)
            same = state.keys() == wanted.keys() and all(
                np.array_equal(state[name], wanted[name], equal_nan=True) for name in wanted
            )
        else:
            same = _files(folders[0]) == _files(folders[1])
        found += [] if same else [step["name"]]
    return found


def _untimed(value):
    if isinstance(value, dict):
        return {name: _untimed(each) for name, each in value.items() if name not in TIMES}
    return [_untimed(each) for each in value] if isinstance(value, list) else value


def _files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def own_cost(workdir: Path) -> tuple[float, float]:
    """(seconds of the command, those of its steps) of a recipe that was run in one go."""
    seconds = json.loads((workdir / FILE_NAME).read_text())["seconds"]
    return seconds["command"], seconds["steps"]


def main(argv: list[str]) -> dict:
    """Measures, and prints the marks."""
    asked = parse(argv)
    parts, marks, figures = asked.parts, [], {}
    with tempfile.TemporaryDirectory(prefix="recipes_") as name:
        scratch, finished = Path(name), asked.of
        file = scratch / "killed.py"
        file.write_text(_RECIPE.format(path=str(asked.recipe.absolute())))
        if finished is None:
            begin, finished = time.perf_counter(), scratch / "undisturbed"
            if start(file, finished).wait():
                raise SystemExit((scratch / "undisturbed.txt").read_text())
            figures["undisturbed"] = time.perf_counter() - begin
        if "kills" in parts and asked.of is None:
            other, seconds = scratch / "killed", figures["undisturbed"]
            killed = kill_again_and_again(file, other, asked.kills, seconds, asked.seed)
            differ = differences(finished, other)
            figures |= {"kills": killed, "differences": differ}
            print(f"killed {killed} times: {len(differ)} differences {' '.join(differ)}")
        if "cost" in parts:
            command, steps = own_cost(finished)
            figures |= {"command": command, "steps": steps}
            share = command / steps
            marks.append(Mark("whole command / its steps", LIMIT, Ratio(share, share, share)))
    print("\n".join(map(str, marks)))
    return with_machine("benchmarks.recipes", figures, asked.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
