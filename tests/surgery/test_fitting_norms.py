"""Routers that foretell norms of experts know more than means, and pay where it counts."""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.experts.norm_fit import r_squared
from dynmoe_jax.surgery.experts.router_fit import pairs_of
from dynmoe_jax.surgery.operations.fit_norms import FitNorms
from dynmoe_jax.surgery.operations.fit_router import FitRouter
from tests.in_memory_surgery import logits, result_of
from tests.surgery.test_fitting_routers import D, E, split, trained

assert split
assert trained  # fixtures, which pytest finds by name


def fitted(model, trained, **settings):
    """(settings, arrays, findings of the layer) of a fit."""
    found = {}
    operation = FitNorms(hidden_width=32, **settings)
    cfg, arrays = result_of(
        operation, model, statistic=lambda name, layer: trained[1], findings=found
    )
    return cfg, arrays, found[0]


@pytest.fixture(scope="module")
def routed(trained, split):
    return fitted(split, trained, tau=0.4)


def test_what_is_foretold_is_better_than_means_and_better_used_than_a_fixed_number(split, routed):
    cfg, arrays, found = routed
    assert found["R^2"] > 0.3
    assert 1 < found["experts"] < E
    assert found["deviation"] > 0
    assert found["oracle"] < found["chance"]
    # As many for each token as the mean, rounded up: no fewer experts, and a larger error.
    assert found["fitted"] < found["as many for each token"] < found["chance"]
    assert arrays[Place(0, "feed_forward.router_in_DU")].shape == (D, 32)
    route = cfg.model.moe.route
    assert (cfg.model.moe.router, route.tau, route.hidden_width) == ("threshold", 0.4, 32)
    for place, array in split[1].items():
        if "router" not in place.name:
            np.testing.assert_array_equal(arrays[place], array)


def test_norms_that_are_learned_are_those_of_the_outputs(split, trained):
    weights = {
        name: np.stack([split[1][Place(0, f"feed_forward.{name}", e)] for e in range(E)])
        for name in ("up_EDF", "down_EFD")
    }
    kind = split[0].model.moe.expert_kind
    x_SD = trained[1][:300]
    outputs = np.maximum(np.einsum("sd,edf->esf", x_SD, weights["up_EDF"]), 0) @ weights["down_EFD"]
    norms = np.linalg.norm(outputs, axis=2).T
    np.testing.assert_allclose(pairs_of(kind, weights, x_SD).norm_SE, norms, rtol=1e-3, atol=1e-3)
    assert r_squared(norms, norms) == 1.0
    means = np.broadcast_to(norms.mean(axis=0), norms.shape)
    assert r_squared(means, norms) == pytest.approx(0.0, abs=1e-6)


def test_with_all_experts_on_nothing_changes_and_a_threshold_can_be_fitted_again(
    trained, split, routed
):
    for settings in ({"tau": 0.0}, {"tau": 1.0, "sense": "released"}):
        operation = FitNorms(epochs=1, **settings)
        assert operation.promise([split[0]]) == 1e-5
        result = fitted(split, trained, epochs=1, **settings)[:2]
        assert np.abs(logits(*result) - logits(*split)).max() < 1e-5
    assert FitNorms().promise([split[0]]) is None
    again = FitNorms(tau=0.0)
    assert again.promise([routed[0]]) is None
    assert again.wanted([routed[0]]).model.moe.route.takes_all
    assert again.result([routed[0]]).model.moe.route.hidden_width == 128


def test_models_and_numbers_that_do_not_fit_are_refused(trained, split, routed):
    with pytest.raises(ConfigError, match="name a model that split made"):
        FitNorms().result([trained[0][0]])
    with pytest.raises(ConfigError, match="--k=6 is more than the 5 experts"):
        FitNorms(rule="fixed", k=6).result([split[0]])
    with pytest.raises(ConfigError, match="has no experts that top-k weighs by 1"):
        FitRouter().result([routed[0]])
