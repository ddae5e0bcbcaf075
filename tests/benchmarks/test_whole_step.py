"""The benchmark of whole training steps on a shape that takes milliseconds."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from benchmarks import train_cases, train_step

TINY = train_cases.PRESETS["tiny"]


@pytest.mark.long
def test_models_train_and_fill_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "pin_threads", lambda threads: None)
    path = tmp_path / "found.json"
    methods = "--methods=dense,top_2,top_p_2"
    result = train_step.main(["--preset=tiny", methods, "--rounds=2", f"--json={path}"])
    by_model = {record["model"]: record for record in result["records"]}
    assert by_model["dense"]["experts_per_token"] == 0
    assert by_model["top_2"]["experts_per_token"] == 2
    # Sharpened on a quarter of the batch.
    assert by_model["top_p_2"]["experts_per_token"] == pytest.approx(2, abs=0.3)
    assert by_model["top_2"]["rate_over_top_2"]["median"] == 1
    assert [mark["name"] for mark in result["marks"]] == ["tokens/s, top-p of mean 2 / top-2"]
    assert path.exists()


def test_marks_compare_rates_with_the_faster_mixtral():
    seconds = {
        "top_2": np.array([2.0, 2.0]),
        "top_p_2": np.array([2.5, 2.5]),
        "hf_eager": np.array([9.0, 9.0]),
        "hf_grouped_mm": np.array([3.0, 3.0]),
    }
    mixtral, top_p = train_step.marks(seconds, {}, "cpu")
    assert "hf_grouped_mm" in mixtral.name
    assert mixtral.value.median == 1.5
    assert mixtral.met
    assert top_p.value.median == 0.8
    assert not top_p.met


def test_presets_reach_the_other_process_whole():
    values = dataclasses.asdict(TINY)
    assert train_cases.preset_of(values) == TINY


@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="extra bench: torch, transformers",
)
def test_mixtral_has_the_parameters_of_our_top_2_model():
    from benchmarks.train_torch import make_model
    from dynmoe_jax.model.parameters import count_parameters

    model = make_model(TINY, 2, "eager")
    theirs = sum(parameter.numel() for parameter in model.parameters())
    assert theirs == count_parameters(TINY.model)
