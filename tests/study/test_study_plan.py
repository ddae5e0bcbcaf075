"""Runs of a study that failed, that are continued, and whose settings others decide."""

import dataclasses
import json
import math

import pytest

from dynmoe_jax.runs.summary import DomainResult, HeldOut, Summary, write_summary
from dynmoe_jax.study.comparison.asked import Asked
from dynmoe_jax.study.comparison.plan import FAILED, Arm, Request, arms_of, reached_experts
from dynmoe_jax.study.measures.items import Items, digest_of
from dynmoe_jax.study.questions import QUESTIONS


def finish(folder, loss=1.0, step=40):
    """Leaves the summary of a complete run."""
    heldout = HeldOut(loss, loss, 1.0, {"all": DomainResult(loss, loss, 1)})
    folder.mkdir(parents=True)
    write_summary(folder, Summary(True, step, step, 1, 1, heldout, 1.0, 0.1, {}, None, {}))


def log(folder, experts_by_step):
    lines = [{"step": step, "experts_per_token": n} for step, n in experts_by_step.items()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def asked(tmp_path):
    return Request("tiny", tmp_path, 2, learning_rates=(0.1, 0.2, 0.3))


def test_the_best_rate_is_of_the_lowest_loss_and_a_diverged_run_is_none(asked):
    for rate, loss in ((0.1, 2.0), (0.2, 1.5), (0.3, math.nan)):
        finish(Arm("dynamic", 0, rate).folder(asked), loss)
    assert Arm("dynamic", 1).settings(asked).optimizer.learning_rate == 0.2
    assert Arm("ablation_base", 0).settings(asked).optimizer.learning_rate == 0.2
    folder = Arm("dense", 0, 0.1).folder(asked)
    folder.mkdir(parents=True)
    (folder / FAILED).write_text("the loss is not finite.\n")
    for rate, loss in ((0.2, 3.0), (0.3, 2.5)):
        finish(Arm("dense", 0, rate).folder(asked), loss)
    assert Arm("dense", 1).settings(asked).optimizer.learning_rate == 0.3


def test_what_is_made_of_a_failed_run_fails_with_it_and_nothing_else(asked):
    for rate in asked.learning_rates:
        finish(Arm("dynamic", 0, rate).folder(asked))
    folder = Arm("dynamic", 1).folder(asked)
    folder.mkdir(parents=True)
    (folder / FAILED).write_text("the loss is not finite.\n")
    failed = {arm for arm in arms_of(asked) if arm.failure(asked)}
    assert failed == {Arm("dynamic", 1), Arm("dynamic_budget", 1)}
    assert "dynamic/1" in Arm("dynamic_budget", 1).failure(asked)


def test_the_budget_is_the_mean_of_the_last_tenth(tmp_path):
    asked = Request("tiny", tmp_path, 1)
    log(
        Arm("dynamic", 0).folder(asked), {step: 1.0 if step <= 36 else 2.5 for step in range(1, 41)}
    )
    settings = Arm("dynamic_budget", 0).settings(asked)
    assert settings.model.moe.top_p.experts_per_token == 2.5


def test_lines_that_a_continued_run_logs_besides_count_nowhere(tmp_path):
    train = dataclasses.replace(Request("tiny", tmp_path, 1).base.train, log_every_steps=10)
    log(tmp_path / "whole", {1: 5.0, 10: 4.0, 20: 3.0, 30: 2.0, 40: 1.0})
    log(tmp_path / "stopped", {1: 5.0, 10: 4.0, 20: 3.0, 30: 2.0, 38: 9.0, 40: 1.0})
    assert reached_experts(tmp_path / "stopped", train) == 1.0
    assert reached_experts(tmp_path / "whole", train) == 1.0


def test_items_that_change_are_asked_again(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"a": 1}\n')
    before = digest_of(tmp_path)
    assert Items().depends_on(tmp_path) == {"items": before}
    (tmp_path / "piqa.jsonl").write_text('{"a": 2}\n')
    assert digest_of(tmp_path) != before
    assert Items().depends_on(None) == {"items": ""}


def test_every_question_has_its_file_and_its_models():
    assert tuple(QUESTIONS) == tuple(Asked)
    names = {name for question in QUESTIONS.values() for name in question.models}
    assert names == set(Request("tiny", None, 1).models)
