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
    if name == "branch_train_merge":
        ensembles_know_the_domain(workdir / "steps", steps)
    if name == "branch_train_mix":
        frozen_experts_are_those_of_branches(workdir / "steps", steps)
    if name == "d2dmoe":
        lower_shares_use_more_experts(workdir / "steps", steps)
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


def ensembles_know_the_domain(folder, steps):
    """Ten steps are few, but a branch predicts its own domain best, and the posterior says so."""
    bits = steps["ensemble"]["bits_per_byte"]
    assert bits < steps["ensemble_by_chance"]["bits_per_byte"]
    # Both on the text, and over the bytes, of a training's held-out evaluation.
    alone = json.loads((folder / steps["ensemble"]["folder"] / "ensemble.json").read_text())
    branches = [steps[f"branch_{domain}"] for domain in alone["domains"]]
    members = [branch["bits_per_byte"] for branch in branches]
    assert alone["all"]["bits_per_byte_by_member"] == pytest.approx(members, rel=1e-5)
    for number, domain in enumerate(alone["domains"].values()):
        assert np.argmin(domain["loss_by_member"]) == number
        assert np.argmax(domain["posterior"]) == number
        assert sum(domain["posterior"]) == pytest.approx(1)
        assert domain["loss"] <= domain["loss_bound"]
        assert domain["tokens_until_sure"] <= 50  # the median document's


def frozen_experts_are_those_of_branches(folder, steps):
    """Trained experts move, frozen ones stay bit for bit, and the router beside them moves."""

    def arrays(name):
        with opened_run(folder / steps[name]["folder"]) as run:
            stored = [each for each, _ in stored_in(run.config.model)]
            own = [each for each in stored if each.name.startswith("feed_forward.")]
            return {each.name: run.read(each.path) for each in own}

    before, trained, frozen = map(arrays, ("mix", "mix_trained", "frozen_experts"))
    for name, array in before.items():
        assert np.any(trained[name] != array)
        assert np.array_equal(frozen[name], array) == ("router" not in name)


def lower_shares_use_more_experts(folder, steps):
    """Of the largest score, and not as many for every token; what that costs is counted."""
    found = json.loads((folder / steps["sparsified_swept"]["folder"] / "sweep.json").read_text())
    largest, _, fixed = (line["points"] for line in found["lines"])
    for least, most in (largest, fixed[::-1]):
        assert least["experts_per_token"] > most["experts_per_token"]
        assert least["flops_per_token"] > most["flops_per_token"]
    assert all(point["deviation"] > 0 for point in largest)
    assert [point["deviation"] for point in fixed] == [0, 0]
    assert [point["experts_per_token"] for point in fixed] == [2, 8]


def upcycled_is_trained(folder):
    """Experts that began as copies of one feed-forward are no copies any more."""
    with opened_run(folder) as run:
        for stored, _ in stored_in(run.config.model):
            if stored.experts and "feed_forward" in stored.name:
                experts = np.moveaxis(run.read(stored.path), int(bool(stored.layers)), 0)
                apart = [np.abs(expert - experts[0]).max() for expert in experts[1:]]
                assert min(apart) > 0, stored.name
