"""Every recipe at its tiny size, in one folder: steps that are alike are shared."""

import json
from pathlib import Path

import numpy as np
import pytest

from dynmoe_jax.edits.places import stored_in
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.surgery.recipes.recipe import Asked
from dynmoe_jax.surgery.recipes.run import run_recipe

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


def run(name, workdir):
    """Runs a recipe; its steps by name."""
    assert run_recipe(Asked(ROOT / "recipes" / f"{name}.py", workdir, "tiny")) == 0
    record = json.loads((workdir / "recipe.json").read_text())
    return record, {step["name"]: step for step in record["steps"]}


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_to_its_end(name, workdir):
    record, steps = run(name, workdir)
    page = (workdir / "recipe.html").read_text()
    for comparison in record["comparisons"]:
        assert np.isfinite(comparison["difference"])
        assert comparison["sentence"].partition(",")[0] in page
    for step in steps.values():
        assert (workdir / "steps" / step["folder"]).is_dir()
        if step["kind"] in ("train", "operate"):
            assert 0 < step["bits_per_byte"] < 8
    if name == "flan_moe":
        instructed_models_answer_better(workdir / "steps", steps)
    if name == "upcycling":
        upcycled_is_trained(workdir / "steps" / steps["upcycled_trained"]["folder"])
        # Equal to the model that it was made of, and neither FLOPs nor chance come in between.
        assert steps["upcycled"]["bits_per_byte"] == pytest.approx(
            steps["dense"]["bits_per_byte"], abs=1e-5
        )


def instructed_models_answer_better(folder, steps):
    """Twenty steps are few, but responses to new templates are likelier with each regime."""

    def bits(regime):
        step = steps[f"top_2_{regime}_scored"]
        found = json.loads((folder / step["folder"] / "instructions.json").read_text())
        return found["all"]["bits_per_byte"]

    assert bits("untuned") - bits("instructed") > 0.3
    assert bits("untuned") - bits("direct") > 0.1
    assert bits("direct") - bits("instructed_direct") > 0.1


def upcycled_is_trained(folder):
    """Experts that began as copies of one feed-forward are no copies any more."""
    with opened_run(folder) as run:
        for stored, _ in stored_in(run.config.model):
            if stored.experts and "feed_forward" in stored.name:
                experts = np.moveaxis(run.read(stored.path), int(bool(stored.layers)), 0)
                apart = [np.abs(expert - experts[0]).max() for expert in experts[1:]]
                assert min(apart) > 0, stored.name
