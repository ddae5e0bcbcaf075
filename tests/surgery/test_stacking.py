"""Stacked models: which layer is a copy of which, and when to stack."""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.edits.settings import edited
from dynmoe_jax.surgery.operations.stack import Stack, growth_tokens
from tests.in_memory_surgery import drawn, logits, result_of, settings


@pytest.mark.parametrize(("times", "interleaved"), [(2, False), (2, True), (4, False)])
def test_layers_are_copies_bit_for_bit(times, interleaved):
    # Every second layer has experts, and one layer something of its own.
    cfg = settings(num_layers=4, moe={"num_experts": 3, "hidden_width": 8, "every_n_layers": 2})
    parent = cfg, drawn(cfg)
    result, arrays = result_of(Stack(times, interleaved), parent)
    assert result.model.num_layers == 4 * times
    for place, values in arrays.items():
        if place.layer is None:
            np.testing.assert_array_equal(values, parent[1][place])
        else:
            old = place.layer // times if interleaved else place.layer % 4
            np.testing.assert_array_equal(values, parent[1][place.at(old)])
    is_moe = [layer.is_moe for layer in result.model.by_layer]
    order = [i // times if interleaved else i % 4 for i in range(4 * times)]
    assert is_moe == [cfg.model.by_layer[i].is_moe for i in order]


def test_a_stack_computes_the_same_scanned_and_unrolled():
    cfg = settings(num_layers=1)
    parent = cfg, drawn(cfg)
    found = []
    for unroll in (1, 2):
        stacked, arrays = result_of(Stack(2), parent)
        found.append(logits(edited(stacked, {"model.unroll": unroll}), arrays))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)


def test_layers_keep_what_they_have_of_their_own():
    cfg = settings(num_layers=2, layers="1:hidden_width=40", activation="relu")
    result, arrays = result_of(Stack(2), (cfg, drawn(cfg)))
    widths = [layer.model.hidden_width for layer in result.model.by_layer]
    assert widths == [24, 40, 24, 40]
    assert arrays[Place(3, "feed_forward.down_FD")].shape == (40, 16)


def test_moments_are_copies_too():
    cfg = settings()
    moments = {place: np.abs(x) for place, x in drawn(cfg).items()}
    _, arrays = result_of(Stack(2), (cfg, moments), role=Role.SECOND)
    place = Place(3, "attention.query_DHW")
    np.testing.assert_array_equal(arrays[place], moments[place.at(1)])


@pytest.mark.parametrize(
    ("parameters", "tokens", "billions"), [(7e9, 2e12, 11.1), (8e9, 15e12, 6.6)]
)
def test_the_time_to_stack_is_that_of_the_papers_table(parameters, tokens, billions):
    assert growth_tokens(parameters, 6 * parameters * tokens) == pytest.approx(
        billions * 1e9, rel=0.01
    )
