"""Nets that stand for projections: exact with room enough, near with less, honest about their
errors, and refused where there is no plain matrix to fit."""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.operations.fit_projections import FitProjections
from tests.in_memory_surgery import drawn, logits, result_of, settings

STILL = {"epochs": 1, "learning_rate": 1e-30, "batch_size": 16}
"""A fit that leaves a net as it begins."""

FIT = {"epochs": 40, "batch_size": 32}


def inputs(name, layer):
    """Inputs whose directions differ much in size, so that few of them matter."""
    random = np.random.default_rng(layer)
    size = np.exp2(-np.arange(16))
    if name == "attention_input_samples":
        return np.float32(random.standard_normal((400, 16)) * size + 0.5)
    return np.float32(random.standard_normal((400, 16)) * size - 0.2).reshape(400, 2, 8)


@pytest.fixture(scope="module")
def dense():
    cfg = settings()
    return cfg, drawn(cfg)


def fitted(dense, **more):
    """(settings, arrays, findings by layer) of a fit."""
    found = {}
    cfg, arrays = result_of(FitProjections(**more), dense, statistic=inputs, findings=found)
    return cfg, arrays, found


def test_with_two_units_for_each_output_nets_compute_the_same(dense):
    cfg, arrays, found = fitted(dense, factor=5.0, **STILL)
    before = logits(*dense)
    np.testing.assert_allclose(logits(cfg, arrays), before, atol=1e-4 * np.abs(before).max())
    assert all(own["nets"] < 1e-9 for own in found.values())


def test_a_fit_comes_nearer_and_errors_are_those_of_fresh_samples(dense):
    first, fit = (fitted(dense, factor=0.5, **more)[2] for more in (STILL, FIT))
    assert all(fit[layer]["nets"] < 0.8 * first[layer]["nets"] for layer in fit)
    assert all(own["linear maps"] > 0 for own in fit.values())
    for own in fit.values():
        each = [own[name] for name in ("query", "key", "value", "output")]
        assert own["nets"] == pytest.approx(np.mean(each))


def test_a_fit_that_gets_lost_or_has_nothing_to_fit_leaves_nets_as_they_begin(dense):
    wanted = fitted(dense, factor=0.5, **STILL)[2]
    lost = fitted(dense, factor=0.5, **STILL | {"learning_rate": 1e9})[2]
    assert [own["nets"] for own in lost.values()] == [own["nets"] for own in wanted.values()]
    silent = lambda name, layer: np.zeros_like(inputs(name, layer))  # noqa: E731
    _, arrays = result_of(FitProjections(**FIT), dense, statistic=silent)
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_only_targets_are_replaced_and_nothing_else_changes(dense):
    _, arrays, found = fitted(dense, targets="query|output", **STILL)
    assert set(found[0]) == {"nets", "linear maps", "query", "output"}
    for place, array in dense[1].items():
        replaced = place.array_name in ("query_DHW", "output_HWD")
        assert (place in arrays) != replaced
        if not replaced:
            np.testing.assert_array_equal(arrays[place], array)
    # 16 inputs, 16 outputs: (16 * 16 + 16) / (16 + 16 + 1) units.
    assert arrays[Place(0, "attention.query_in_DU")].shape == (16, 8)
    assert arrays[Place(0, "attention.output_out_UD")].shape == (8, 16)
    asked = FitProjections(targets="key").wanted([dense[0]])
    assert asked.names == {"attention_input_samples"}
    assert FitProjections(targets="out").wanted([dense[0]]).names == {"attention_mixed_samples"}


def test_new_parameters_have_no_history(dense):
    places = {Role.PARAMETER: dense[1], Role.FIRST: dense[1], Role.SECOND: dense[1]}
    _, arrays = result_of(
        FitProjections(**STILL), (dense[0], places), role=Role.SECOND, statistic=inputs
    )
    assert not np.any(arrays[Place(1, "attention.value_in_DU")])
    np.testing.assert_array_equal(
        arrays[Place(1, "feed_forward.down_FD")], dense[1][Place(1, "feed_forward.down_FD")]
    )


def test_models_without_plain_matrices_and_targets_that_find_none_are_refused(dense):
    with pytest.raises(ConfigError, match=r"config.model.linear='lora'; nets are fitted to plain"):
        FitProjections().result([settings(linear="lora")])
    with pytest.raises(ConfigError, match="targets='gate' must find one of query_DHW"):
        FitProjections(targets="gate").result([dense[0]])
    with pytest.raises(ConfigError, match=r"factor=1e\+30 must be at most 1000"):
        FitProjections(factor=1e30).result([dense[0]])
