"""Runs of layers: they give the layers back, and no other division compiles fewer."""

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynmoe_jax.model.periods import Run, find_runs

LAYERS = st.lists(st.sampled_from("abcd"), max_size=40)
FEW = st.lists(st.sampled_from("abc"), max_size=8)


def cost(runs):
    return sum(len(run.period) for run in runs), len(runs)


@functools.cache
def cheapest(layers):
    """The least cost, over every division into runs."""
    if not layers:
        return 0, 0
    ways = []
    for length, repeats in itertools.product(range(1, len(layers) + 1), repeat=2):
        end = length * repeats
        if end <= len(layers) and layers[:end] == layers[:length] * repeats:
            rest = cheapest(layers[end:])
            ways.append((length + rest[0], 1 + rest[1]))
    return min(ways)


@given(LAYERS)
def test_the_runs_give_the_layers_back(layers):
    runs = find_runs(layers)
    assert [layer for run in runs for layer in run.layers] == layers
    assert all(run.repeats >= 1 and run.period for run in runs)


@given(FEW)
def test_no_division_is_cheaper(layers):
    assert cost(find_runs(layers)) == cheapest(tuple(layers))


@pytest.mark.parametrize(
    ("layers", "runs"),
    [
        ("", ()),
        ("a" * 24, (Run(("a",), 24),)),
        ("a" * 6 + "b" * 6 + "c" * 6 + "d" * 6, tuple(Run((x,), 6) for x in "abcd")),
        ("md" * 12, (Run(("m", "d"), 12),)),
        ("d" + "dmm" * 4, (Run(("d",), 1), Run(("d", "m", "m"), 4))),
        ("abcd", (Run(("a", "b", "c", "d"), 1),)),
    ],
)
def test_divisions(layers, runs):
    assert find_runs(layers) == runs


def test_fewer_runs_where_as_many_layers_are_compiled():
    assert cost(find_runs("abab")) == (2, 1)
    assert cost(find_runs("abcab")) == (5, 1)
