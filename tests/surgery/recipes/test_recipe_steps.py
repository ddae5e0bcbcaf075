"""Keys, prices, plans and answers of recipes: nothing is trained."""

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from dynmoe_jax.config import ConfigError
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.surgery.operations.average import Average
from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.recipes import (
    Comparison,
    Ensemble,
    Evaluate,
    Export,
    Operate,
    Recipe,
    Train,
    run,
    sizes,
)
from dynmoe_jax.surgery.recipes.recipe import Asked, Plan, planned
from dynmoe_jax.surgery.recipes.record import make_record
from dynmoe_jax.surgery.recipes.step import Result
from dynmoe_jax.surgery.request import Options

ROOT = Path(__file__).parents[3]


def steps_of(learning_rate=5e-3, num_experts=4, later_steps=20):
    """A dense model, what is made of it, and that trained on."""
    cfg = sizes.dense("tiny", 0)
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=learning_rate)
    dense = Train("dense", dataclasses.replace(cfg, optimizer=optimizer))
    made = Operate("made", Upcycle(num_experts=num_experts, top_k=2), (dense,))
    return dense, made, Train("later", sizes.dense("tiny", 1, steps=later_steps), made)


@pytest.mark.parametrize(
    ("change", "done_again"),
    [
        ({}, []),
        ({"later_steps": 21}, ["later"]),
        ({"num_experts": 8}, ["made", "later"]),
        ({"learning_rate": 4e-3}, ["dense", "made", "later"]),
    ],
)
def test_a_change_does_again_what_depends_on_it_and_nothing_else(change, done_again):
    pairs = zip(steps_of(), steps_of(**change), strict=True)
    assert [now.name for was, now in pairs if was.key != now.key] == done_again


def test_settings_that_another_version_may_add_are_no_part_of_a_key():
    dense, made, _ = steps_of(num_experts=16)
    assert made.facts()["settings"] == {"num_experts": 16, "top_k": 2}
    assert made.facts()["options"] == {}
    assert dense.facts()["optimizer.learning_rate"] == 5e-3
    assert "loss.z_weight" not in dense.facts()


def test_changed_text_trains_again(tmp_path):
    (tmp_path / "a.txt").write_text("before")
    train = lambda: Train("dense", sizes.dense("tiny", 0, f"text:{tmp_path}/*.txt"))  # noqa: E731
    before = train().key
    assert train().key == before
    (tmp_path / "a.txt").write_text("after")
    assert train().key != before


def test_the_order_and_the_place_of_models_that_are_there_count(tmp_path, monkeypatch):
    dense, there = steps_of()[0], Path("there")
    key = lambda *parents: Operate("made", Average(), parents).key  # noqa: E731
    assert key(dense, there) != key(there, dense)
    monkeypatch.chdir(tmp_path)
    assert key(dense, there) == key(dense, tmp_path / "there")


def test_a_step_takes_the_model_of_what_it_needs():
    _, made, later = steps_of()
    assert made.settings.model.moe.num_experts == 4
    assert later.settings.model == made.settings.model
    # In each of two layers three more feed-forwards of 3 x 32 x 64, and a router of 32 x 4; all
    # with two moments, in float32.
    more = 2 * (3 * 3 * 32 * 64 + 32 * 4) * 3 * 4
    assert later.price().stored_bytes == steps_of()[0].price().stored_bytes + more


def test_so_many_flops_pay_for_as_many_steps():
    dense, _, later = steps_of()
    paid = later.with_flops(10 * dense.flops)
    assert paid.flops == pytest.approx(10 * dense.flops, rel=0.03)
    assert paid.cfg.train.steps < 10 * dense.cfg.train.steps  # a step of the mixture costs more


def test_reference_losses_are_those_of_a_step_which_is_done_before():
    cfg = sizes.dense("tiny", 0)
    moving = dataclasses.replace(cfg.data, reweighting="dynamic_batch_loading")
    dense = Train("dense", cfg)
    later = Train("later", dataclasses.replace(cfg, data=moving), reference=dense)
    assert later.needs == (dense,)
    text = later.message(lambda step: Path("steps") / step.name, Path("text"))["settings"]["data"]
    assert text["dynamic_batch_loading"]["reference"] == "steps/dense"
    with pytest.raises(ConfigError, match=r"reference dense has no effect while config\.data"):
        Train("later", cfg, reference=dense).price()


def test_what_holds_no_model_cannot_be_built_on():
    dense = steps_of()[0]
    export = Export("export", dense)
    with pytest.raises(ConfigError, match="step twice needs a model, and export makes none"):
        Export("twice", export).price()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: Operate("x", Upcycle(num_experts=0), (d,)), "--num_experts=0 must be at least"),
        (lambda d: Operate("x", Split(by="chance"), (d,)), "--by='chance' must be one of"),
        (
            lambda d: Operate("x", Split(by="random", share="inner"), (d,)),
            "--share=inner has no effect with --by=random",
        ),
        (lambda d: Operate("x", Upcycle(), (d,), Options(dtype="int3")), "--dtype='int3' must be"),
        (lambda d: Operate("x", Upcycle(), (d, d)), "takes 1 model, and 2 are named"),
        (lambda d: Ensemble("x", (d, d)), "x needs two members or more, each named once"),
        (
            lambda d: Ensemble("x", (d, Train("y", sizes.dense("tiny", 1))), top_k=3),
            "top_k=3 must be from 1 to the 2 members",
        ),
        (lambda d: Export("x", d, "int3"), "dtype=int3 must be one of float32, bfloat16"),
        (lambda d: Evaluate("x", d, ("--rooting",)), "unrecognized arguments: --rooting"),
        (
            lambda d: Train("x", sizes.dense("tiny", 0, init_from="runs/x"), d),
            "config.train.init_from='runs/x' has no effect",
        ),
    ],
)
def test_a_step_that_would_fail_is_refused_before_anything_is_done(make, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        make(steps_of()[0]).price()


def test_every_recipe_can_be_planned():
    for file in sorted((ROOT / "recipes").glob("*.py")):
        plan = planned(Asked(file, ROOT))
        for recipe in plan.recipes:
            assert {step.key for step in recipe.steps} == {s.key for s in recipe.every_step}


def test_a_plan_names_steps_whole_on_a_narrow_terminal_and_adds_prices_up(monkeypatch):
    narrow = Console(width=80, record=True, force_terminal=False, file=io.StringIO())
    monkeypatch.setattr(run, "console", narrow)
    plan = planned(Asked(ROOT / "recipes/branch_train_mix.py", ROOT, seeds=2))
    run.show_steps(plan)
    told = narrow.export_text()
    assert all(f" {step.name} " in told for step in plan.steps.values())
    last = told.rstrip().splitlines()[-1].split()
    flops = sum(step.price().flops for step in plan.steps.values())
    assert last[:2] == ["all", compact(flops)]


def plan_of(*recipes):
    steps = {}
    for recipe in recipes:
        for step in recipe.steps:
            steps[step.key] = step
    return Plan("title", "about", recipes, steps)


def test_flops_of_a_model_count_what_it_is_made_of_once():
    dense, made, later = steps_of()
    again = Train("again", sizes.dense("tiny", 2), made)
    plan = plan_of(Recipe((dense, made, later, again)))
    assert plan.flops(made) == dense.flops
    assert plan.flops(later) == dense.flops + later.flops


class Found:
    """Steps whose results are given, in folders that are empty."""

    def __init__(self, bits, by="bits"):
        self.bits, self.by = bits, by

    def record(self, tmp_path, monkeypatch):
        recipes = []
        for seed, pair in enumerate(self.bits):
            one, other = (Train(name, sizes.dense("tiny", seed)) for name in ("one", "other"))
            other = dataclasses.replace(other, cfg=sizes.dense("tiny", seed + 10, steps=10))
            recipes.append(Recipe((one, other), (Comparison(one, other, self.by),)))
            for step, value in zip((one, other), pair, strict=True):
                folder = tmp_path / step.folder_name
                folder.mkdir()
                (folder / "bits").write_text(str(value))

        def read(step, folder):
            value = float((folder / "bits").read_text())
            return Result(value) if self.by == "bits" else Result(exact={"all": value})

        monkeypatch.setattr(Train, "result", read)
        asked = Asked(tmp_path / "recipe.py", tmp_path, "tiny", len(self.bits))
        place = lambda step: tmp_path / step.folder_name  # noqa: E731
        return make_record(plan_of(*recipes), asked, {}, place)


def test_comparison_has_the_interval_of_students_t(tmp_path, monkeypatch):
    found = Found([(2.0, 2.5), (2.1, 2.4), (2.2, 2.6)]).record(tmp_path, monkeypatch)
    (said,) = found["comparisons"]
    assert said["difference"] == pytest.approx(-0.4)
    # Differences -0.5, -0.3, -0.4: their standard deviation is 0.1.
    assert said["half"] == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    assert said["better"] == 3
    assert said["sentence"].startswith("one has 0.4000 bits per byte less than other (0.1516 to")
    assert "2.00 of its FLOPs" in said["sentence"]


def test_comparison_that_seeds_do_not_decide_says_so(tmp_path, monkeypatch):
    found = Found([(2.0, 2.5), (2.5, 2.1)]).record(tmp_path, monkeypatch)
    assert "which these seeds do not decide" in found["comparisons"][0]["sentence"]


def test_comparison_from_one_seed_has_no_interval(tmp_path, monkeypatch):
    found = Found([(2.0, 2.5)]).record(tmp_path, monkeypatch)
    assert math.isnan(found["comparisons"][0]["half"])
    assert "from one seed" in found["comparisons"][0]["sentence"]


def test_of_exact_responses_more_are_better(tmp_path, monkeypatch):
    pairs = [(0.5, 0.25), (0.5, 0.5), (0.4, 0.2)]
    found = Found(pairs, "exact").record(tmp_path, monkeypatch)
    (said,) = found["comparisons"]
    assert said["difference"] == pytest.approx(0.15)
    assert said["better"] == 2
    assert said["sentence"].startswith("one matches a share of 0.1500 of responses more than other")


def test_changed_files_are_evaluated_again(tmp_path):
    dense, *_ = steps_of()
    file = tmp_path / "a.jsonl"

    def key(text):
        file.write_text(text)
        return Evaluate("x", dense, (f"--instructions=instructions:{file}",)).key

    assert key("1") == key("1") != key("2")


def test_comparison_with_a_model_that_was_there_names_no_flops(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "flops", lambda *_: 0.0)
    found = Found([(2.0, 2.5)]).record(tmp_path, monkeypatch)
    assert found["comparisons"][0]["sentence"].endswith("less than other, from one seed.")


def test_a_damaged_folder_is_named_with_what_to_do(tmp_path):
    dense, *_ = steps_of()
    asked = Asked(tmp_path / "recipe.py", tmp_path, "tiny")
    with pytest.raises(
        CheckpointError, match=r"What train dense has left in .* remove that folder"
    ):
        make_record(plan_of(Recipe((dense,))), asked, {}, lambda step: tmp_path)


def test_operations_add_to_what_their_model_has_on_all_text(tmp_path, monkeypatch):
    dense, made, later = steps_of()
    found = {
        "dense": Result(2.0, by_domain={"code": 1.5, "prose": 2.5}),
        "made": Result(9.0, bits_added=0.25, by_domain={"code": 0.1, "prose": 0.4}),
        "later": Result(1.75, curve=((10, 2.0), (20, 1.75))),
    }
    for step in (dense, made, later):
        (tmp_path / step.folder_name).mkdir()
        monkeypatch.setattr(type(step), "result", lambda step, folder: found[step.name])
    asked = Asked(tmp_path / "recipe.py", tmp_path, "tiny")
    place = lambda step: tmp_path / step.folder_name  # noqa: E731
    record = make_record(plan_of(Recipe((dense, made, later))), asked, {}, place)
    _, upcycled, trained = record["steps"]
    assert upcycled["bits_per_byte"] == 2.25
    assert upcycled["by_domain"] == pytest.approx({"code": 1.6, "prose": 2.9})
    # The line begins at the model that it was made of.
    assert trained["curve"][0] == pytest.approx((dense.flops, 2.25))
    assert trained["curve"][-1] == pytest.approx((dense.flops + later.flops, 1.75))
