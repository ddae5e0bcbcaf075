"""Pieces of the benchmark of surgery."""

import dataclasses
import sys

import numpy as np
import pytest

from benchmarks import surgery, surgery_calibration, surgery_clusters, surgery_memory
from benchmarks import surgery_upcycle as upcycle
from benchmarks.import_memory import resident
from benchmarks.process import Ran, ran
from dynmoe_jax.config import ConfigError
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.surgery.experts.clusters import balanced_assignment


def test_peak_is_that_of_the_program_and_not_of_who_started_it():
    nothing = ran([sys.executable, "-S", "-c", "import time; time.sleep(0.1)"])
    much = "import time; x = b'x' * 150_000_000; time.sleep(0.1); print('done'); 1 / 0"
    filled = ran([sys.executable, "-S", "-c", much])
    assert 0 < nothing.peak_bytes < resident() / 2
    assert 140e6 < filled.peak_bytes - nothing.peak_bytes < 170e6
    assert (nothing.exit_code, filled.exit_code) == (0, 1)
    assert filled.said.startswith("done")
    assert filled.last_words == "ZeroDivisionError: division by zero"
    assert filled.cpu_seconds > 0


@pytest.mark.parametrize("name", ["drawn", "planted"])
def test_oracle_finds_the_cost_of_the_assignment(name):
    cost_FE = surgery_clusters.costs(name, 64, seed=1)
    labels_F = balanced_assignment(cost_FE)
    cost = cost_FE[np.arange(64), labels_F].sum()
    assert surgery_clusters.least_cost(cost_FE) == pytest.approx(cost)


def finished(name, peaks):
    case = upcycle.Case([name, "TO"], None)
    case.runs = [Ran(0, 1.0, 2.0, peak, "") for peak in peaks]
    return case


def test_marks_of_upcycling_are_of_the_rounds_that_count():
    cases = {
        "alone": finished("a", [9e9, 3e8, 4e8]),  # the first round warms up
        "proof": finished("b", [9e9, 9e8, 6e8]),
        "mergekit-moe": finished("c", [9e9, 8e8, 8e8]),
    }
    seconds = {"alone": [5.0, 5.0], "proof": [20.0, 20.0], "mergekit-moe": [10.0, 10.0]}
    seconds = {name: np.array(taken) for name, taken in seconds.items()}
    part = upcycle.found(cases, seconds, 2, "")
    assert [mark.value.median for mark in part.marks] == [0.5, 0.5, 2.0, 1.125]
    assert [mark.met for mark in part.marks] == [True, True, False, False]


def test_without_mergekit_ours_is_shown_and_why(tmp_path, monkeypatch):
    monkeypatch.setattr(upcycle.venv, "create", lambda *_, **__: None)
    failed = Ran(1, 1.0, 1.0, 0, "Collecting mergekit\nERROR: no torch for this Python\n")
    monkeypatch.setattr(upcycle, "ran", lambda arguments: failed)
    program, why = upcycle.mergekit(tmp_path)
    assert program is None
    assert why == "mergekit does not install: ERROR: no torch for this Python"
    cases = {"alone": finished("a", [1, 2]), "proof": finished("b", [1, 2])}
    part = upcycle.found(cases, dict.fromkeys(cases, np.ones(1)), 1, why)
    assert not part.marks
    assert part.lines[-1] == why


def test_missing_model_is_a_sentence(monkeypatch):
    monkeypatch.setattr(upcycle.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"name a model with --model\."):
        upcycle.find_model("")


def test_unknown_part_is_a_sentence():
    with pytest.raises(ConfigError, match="--parts names 'cluster'; there are upcycle,memory,"):
        surgery.main(["--parts=clusters,cluster"])


def test_calibration_takes_all_that_needs_no_gradients_nor_pairs_of_units():
    models = surgery_calibration.MODELS
    dense, experts = (set(surgery_calibration.forward_statistics(m)) for m in models.values())
    assert set(surgery_calibration.ONE) < dense < experts
    assert "routed_tokens" in experts - dense
    assert not {"coactivation", "gradient_importance"} & experts


def test_synthetic_model_is_a_run(tmp_path):
    small = {"num_layers": 2, "width": 16, "num_heads": 2, "num_kv_heads": 2, "head_width": 8}
    model = dataclasses.replace(surgery_memory.DENSE, **small, hidden_width=24, vocab_size=512)
    size = surgery_memory.write_run(tmp_path, model)
    with opened_run(tmp_path) as run:
        down_FD = run.read(("groups", "layers", 0, "feed_forward", "down_FD"), (1,))
        assert run.tokenizer().encode("text").size
    assert down_FD.shape == (24, 16)
    assert 0.01 < down_FD.std() < 0.03
    files = sum(p.stat().st_size for p in (tmp_path / "checkpoints/0/state").rglob("*"))
    assert size < files < 2 * size
