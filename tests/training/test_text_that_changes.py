"""Runs whose text changes on the way: UL2 up to a step, and weights of domains that move."""

import dataclasses
import json
import random

import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.training.trainer import train
from tests.small_run import change, interrupt_at

STEPS, SWITCH = 8, 5
LETTERS = {"even": "abcdefgh ", "sharp": "qrstuvwx "}


@pytest.fixture(scope="module")
def cfg(settings, tmp_path_factory):
    """Eight steps, corrupted before the sixth, evaluated every two, in two microbatches."""
    folder, draw = tmp_path_factory.mktemp("domains"), random.Random(3)
    for name, letters in LETTERS.items():
        texts = ["".join(draw.choices(letters, k=draw.randint(80, 300))) for _ in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = config.Data(
        sources=f"jsonl:{folder}/*.jsonl",
        seq_len=32,
        heldout_fraction=0.2,
        domain_weights="even=1,sharp=1",
        corruption="ul2",
        ul2={"num_sentinels": 8, "until_step": SWITCH},
        reweighting="dynamic_batch_loading",
        dynamic_batch_loading={"reference": "even=6,sharp=4.5"},
    )
    evaluation = dataclasses.replace(
        settings.evaluation, every_steps=2, report=False, sample_tokens=0
    )
    cfg = dataclasses.replace(settings, data=data, evaluation=evaluation)
    return change(
        cfg,
        train__steps=STEPS,
        train__batch_size=16,
        train__microbatches=2,
        model__vocab_size=290,
    )


@pytest.fixture(scope="module")
def straight(cfg, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(cfg, folder) == 0
    return folder


def test_weights_move_toward_the_domain_above_its_reference_and_stand_in_every_line(straight):
    lines = read_metrics(straight)
    sharp = [line["domain_weight_sharp"] for line in lines]
    assert [line["domain_weight_even"] for line in lines] == pytest.approx([1 - w for w in sharp])
    # Evaluated after steps 2, 4, 6 and 8: each moves what follows, and nothing in between.
    assert sharp[0] == sharp[1] == 0.5
    for before, after in ((1, 2), (3, 4), (5, 6)):
        assert sharp[after] > sharp[before]
        assert sharp[after] == sharp[after + 1]


def test_the_loss_is_that_of_targets_until_the_switch_and_of_all_tokens_behind_it(straight):
    shares = [line["learned_share"] for line in read_metrics(straight)]
    assert len(shares) == STEPS
    assert all(0.1 < share < 0.7 for share in shares[:SWITCH])
    assert shares[SWITCH:] == [1.0] * (STEPS - SWITCH)


@pytest.mark.parametrize("stops", [(1, 3, 5, 6), (2, 4, 7)])
def test_a_run_that_was_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(
    cfg, straight, tmp_path, saved_state, monkeypatch, stops
):
    # At even steps it is the evaluation that is cut off: who continues owes it, and its weights.
    for step in stops:
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            assert train(cfg, tmp_path) == EXIT_INTERRUPTED
    assert train(cfg, tmp_path) == 0
    one, other = saved_state(straight, STEPS), saved_state(tmp_path, STEPS)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)
    for a, b in zip(read_metrics(straight), read_metrics(tmp_path), strict=True):
        for name in ("loss", "domain_weight_sharp", "learned_share", "heldout_loss"):
            assert a.get(name) == b.get(name), (a["step"], name)


def test_microbatches_weigh_by_what_they_learn(cfg, straight, tmp_path):
    whole = change(cfg, train__microbatches=1, train__steps=2)
    assert train(whole, tmp_path) == 0
    one, other = (read_metrics(folder)[0] for folder in (straight, tmp_path))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("", "names no losses"),
        ("even=6", "has no loss of sharp"),
        ("even six", "is neither the folder of a run nor a list"),
        ("FOLDER", "has no summary of a finished run"),
    ],
)
def test_a_reference_that_cannot_be_is_refused_in_a_sentence(cfg, tmp_path, reference, said):
    reference = str(tmp_path) if reference == "FOLDER" else reference
    wrong = change(
        cfg,
        data__dynamic_batch_loading__reference=reference,
        data__directory=str(tmp_path / "data"),
    )
    with pytest.raises(config.ConfigError) as error:
        train(wrong, tmp_path / "run")
    assert f"config.data.dynamic_batch_loading.reference={reference!r} {said}" in str(error.value)


def test_a_reference_may_be_a_run_and_is_needed_once(cfg, straight, tmp_path, monkeypatch):
    of_run = change(cfg, train__steps=3, data__dynamic_batch_loading__reference=str(straight))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert train(of_run, tmp_path) == EXIT_INTERRUPTED
    with monkeypatch.context() as patch:
        patch.setattr("dynmoe_jax.training.domain_weights.read_summary", lambda _: None)
        assert train(of_run, tmp_path) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation__every_steps": 0}, "needs held-out losses on the way; set config.evaluation"),
        (
            {"data__domain_weights": "proportional"},
            "moves shares of rows, and config.data.domain_w",
        ),
    ],
)
def test_weights_that_cannot_move_are_refused_in_a_sentence(cfg, tmp_path, changes, said):
    with pytest.raises(config.ConfigError) as error:
        train(change(cfg, **changes), tmp_path / "run")
    assert f"config.data.reweighting='dynamic_batch_loading' {said}" in str(error.value)
    assert not (tmp_path / "run").exists()
