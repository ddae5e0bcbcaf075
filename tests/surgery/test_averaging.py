"""Averages and mixtures of models."""

import numpy as np
import pytest

from dynmoe_jax.edits.arrays import average
from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.operations.average import Average
from dynmoe_jax.surgery.operations.mix import Mix
from tests.in_memory_surgery import drawn, logits, result_of, settings


@pytest.fixture(scope="module")
def branches():
    cfg = settings()
    return [(cfg, drawn(cfg, seed)) for seed in (0, 1)]


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.7, 0.1, 0.2], [0.1, 0.2, 0.7]])
def test_equal_arrays_give_themselves_back_bit_for_bit(weights):
    array = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    np.testing.assert_array_equal(average([array] * 3, weights), array)


def test_the_mean_is_weighed(branches):
    _, arrays = result_of(Average(weights="3,1"), *branches)
    place = Place(1, "attention.query_DHW")
    expected = 0.75 * branches[0][1][place] + 0.25 * branches[1][1][place]
    np.testing.assert_allclose(arrays[place], expected, rtol=1e-5, atol=1e-7)


def test_means_of_squares_stay_what_squares_are(branches):
    """With a negative weight, which goes beyond a model, they would have no root."""
    squares = [(cfg, {place: x**2 for place, x in own.items()}) for cfg, own in branches]
    _, arrays = result_of(Average(weights="1.5,-0.5"), *squares, role=Role.SECOND)
    place = Place(1, "attention.query_DHW")
    expected = 0.75 * squares[0][1][place] + 0.25 * squares[1][1][place]
    np.testing.assert_allclose(arrays[place], expected, rtol=1e-5)


def test_feed_forwards_become_experts_and_the_rest_is_averaged(branches):
    cfg, arrays = result_of(Mix(layers="1"), *branches)
    assert cfg.model.moe_layers == (1,)
    for number, (_, own) in enumerate(branches):
        expert = arrays[Place(1, "feed_forward.down_EFD", number)]
        np.testing.assert_array_equal(expert, own[Place(1, "feed_forward.down_FD")])
    for name in ("feed_forward.down_FD", "attention.key_DGW"):
        mean = np.mean([own[Place(0, name)] for _, own in branches], axis=0)
        np.testing.assert_allclose(arrays[Place(0, name)], mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("router", ["gates", "dense", "gumbel"])
def test_a_mixture_of_equal_models_computes_what_they_do(branches, router):
    parent = branches[0]
    mixed = result_of(Mix(router=router, router_std=1.0), parent, parent)
    assert mixed[0].model.moe.router == (router if router != "gates" else "top_k")
    assert np.abs(logits(*mixed) - logits(*parent)).max() < 1e-5


@pytest.mark.parametrize("text", ["1", "1,2,3", "1,x", "1,-1", "nan,1", "inf,1"])
def test_weights_that_are_none_are_refused(branches, text):
    with pytest.raises(ConfigError, match="must be 2 numbers"):
        Average(weights=text).result([cfg for cfg, _ in branches])


def test_a_mixture_with_two_routers_is_refused(branches):
    with pytest.raises(ConfigError, match="--router=dense --top_k=1 name two routers"):
        Mix(router="dense", top_k=1).result([cfg for cfg, _ in branches])


def test_models_of_two_shapes_are_refused(branches):
    other = settings(hidden_width=32)
    with pytest.raises(ConfigError, match=r"number 2 has config\.model\.hidden_width=32"):
        Average().result([branches[0][0], other])
