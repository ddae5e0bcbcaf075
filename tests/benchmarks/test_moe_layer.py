"""The layer benchmark on a shape that takes milliseconds."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import layer_cases, layer_report, moe_layer

TINY = layer_cases.Preset(tokens=32, width=16, hidden_width=24, num_experts=16)
METHODS = ("ours", "dense", "jax_capacity")


def choose(*names):
    available = layer_cases.choices(TINY, layer_cases.draw(TINY))
    return [available[name] for name in names]


def test_sharpness_is_chosen_to_reach_the_mean():
    preset = layer_cases.Preset(4096, 16, 24, 16)
    arrays = layer_cases.draw(preset)
    logits_TE = arrays.x_TD @ arrays.router_DE
    for mean in (1.5, 2, 4):
        choice = layer_cases.choices(preset, arrays)[f"top_p_{mean:g}"]
        found = layer_cases.experts_of_top_p(choice.scale * logits_TE, choice.p)
        assert found == pytest.approx(mean, abs=2e-3)


def test_jax_cases_fill_the_report():
    cases, used = moe_layer.jax_cases(TINY, choose("top_2", "top_p_2"), METHODS, ("train",))
    assert used["top_2"].rows == 64
    seconds = {name: np.array([case(), case()]) for name, case in cases.items()}
    seconds["copy"] = np.array([1.0, 1.0])
    report = layer_report.Report(TINY, seconds, cases, used)
    assert len(report.records()) == 6
    names = [mark.name for mark in report.marks()]
    assert any("dense layer of equal FLOPs" in name for name in names)
    assert any("top-p of mean 2 / top-2" in name for name in names)
    assert "top_p_2" in report.tables()
    json.dumps(report.records())


def test_paper_mark_counts_useful_flops():
    preset = layer_cases.PRESETS["paper"]
    used = {"top_2": layer_cases.Used(rows=2 * preset.tokens, experts=16)}
    # 3 x 6 x 65,536 rows x 1024 x 2816 FLOPs = 3.4e12.
    seconds = {"ours/top_2/train": np.array([0.01])}
    (mark,) = layer_report.Report(preset, seconds, {}, used).marks()
    assert mark.value.median == pytest.approx(340.16, rel=1e-3)
    assert not mark.met


def test_decode_mark_compares_with_reading_the_experts_used():
    used = {"top_2": layer_cases.Used(rows=64, experts=4)}
    seconds = {"ours/top_2/forward": np.array([3.0]), "copy": np.array([8.0])}
    (mark,) = layer_report.Report(TINY, seconds, {}, used).marks()
    # Copying 16 experts passes 32 experts' bytes in 8 s, so reading 4 takes 1 s.
    assert mark.value.median == pytest.approx(3.0)
    assert not mark.met


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="extra bench: torch")
def test_torch_loop_computes_the_same_layer():
    import torch

    from benchmarks import layer_jax, layer_torch

    arrays = layer_cases.draw(TINY)
    for choice in choose("top_2", "top_p_2"):
        loop = layer_torch.LoopOverExperts(arrays)
        loop.choice = choice
        layer = layer_jax.moe_layer(choice, layer_jax.backend_of("ours", choice))
        placed = layer_jax.on_device(arrays, "float32")
        wanted = layer(placed.x_TD, layer_jax.moe_parameters(placed))
        actual = loop(torch.from_numpy(arrays.x_TD)).detach().numpy()
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)
