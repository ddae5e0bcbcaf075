"""Recipes as the command runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLUGIN = Path(__file__).with_name("counting_step.py")
RECIPE = '''"""Three steps that wait.

More about them.
"""

from dynmoe_jax.surgery.recipes import Recipe
from dynmoe_jax.surgery.recipes.step import STEPS

def get_recipe(size, seed, data):
    Count = STEPS["count"]
    first = Count("first")
    second = Count("second", seconds={seconds}, after=first)
    return Recipe((first, second, Count("third", after=second)))
'''


def command(folder, *flags):
    """The command in a process group of its own, so that all of it can be killed."""
    arguments = [f"--plugin={PLUGIN}", f"--recipe={folder / 'recipe.py'}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "dynmoe_jax.surgery", *arguments, f"--workdir={folder / 'made'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def begun(folder):
    path = folder / "made" / "begun.txt"
    return path.read_text().split() if path.exists() else []


@pytest.mark.slow
def test_a_killed_recipe_goes_on_where_it_was(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE.format(seconds=300))
    process = command(tmp_path)
    end = time.monotonic() + 120
    while "second" not in begun(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps = tmp_path / "made" / "steps"
    assert [
        path.name.split("-")[0] for path in steps.iterdir() if "unfinished" not in path.name
    ] == ["first"]

    # Another second step: the first one is still good.
    (tmp_path / "recipe.py").write_text(RECIPE.format(seconds=0))
    process = command(tmp_path)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert begun(tmp_path) == ["first", "second", "second", "third"]
    assert "2 of 3 steps are left" in told
    record = json.loads((tmp_path / "made" / "recipe.json").read_text())
    assert [step["note"] for step in record["steps"]] == ["first", "second", "third"]
    assert record["steps"][2]["all_flops"] == 30.0
    assert "Three steps that wait" in (tmp_path / "made" / "recipe.html").read_text()
