"""Upcycled models compute what their parents do, where the operation says so.

Axis legend: E experts, G slices of a feed-forward, k experts of a token.
"""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from tests.in_memory_surgery import drawn, logits, result_of, settings


@pytest.fixture(scope="module")
def parent():
    cfg = settings()
    return cfg, drawn(cfg)


def of_kind(activation):
    cfg = settings(activation=activation, num_layers=1)
    return cfg, drawn(cfg)


def difference(parent, operation):
    result = result_of(operation, parent)
    return float(np.abs(logits(*result) - logits(*parent)).max())


@pytest.mark.parametrize(
    "choice",
    [{"top_k": 2}, {"top_p": 0.4}, {"top_k": 1, "layers": "1"}, {"softmax": "after"}],
    ids=str,
)
def test_copies_with_gates_that_sum_to_one_compute_what_the_parent_does(parent, choice):
    operation = Upcycle(num_experts=4, router_std=1.0, **choice)
    assert operation.promise([parent[0]]) == 1e-5
    assert difference(parent, operation) < 1e-5


def test_raw_gates_do_not_and_are_refused_unless_scaled(parent):
    raw = Upcycle(num_experts=4, renormalize=False, scale="none")
    with pytest.raises(ConfigError, match="--scale=down"):
        raw.result([parent[0]])
    # With the logits of an untrained router, which are even, the factor E / k makes up for it.
    scaled = Upcycle(num_experts=4, renormalize=False, router_std=0.0)
    assert difference(parent, scaled) < 1e-5
    assert Upcycle(num_experts=4, renormalize=False).promise([parent[0]]) is None
    uneven = Upcycle(num_experts=4, renormalize=False, router_std=1.0)
    assert difference(parent, uneven) > 1e-2


CASES = [(4, 2, 2), (4, 2, 4), (2, 4, 4)]
"""(copies, G, k) of arXiv 2410.07524's check."""


@pytest.mark.parametrize(
    ("copies", "slices", "k", "softmax", "activation"),
    [
        *((*case, softmax, "reglu") for case in CASES for softmax in ("before", "after")),
        (*CASES[0], "before", "squared_relu"),
    ],
)
def test_virtual_groups_are_exact_with_roots_on_homogeneous_kinds(
    copies, slices, k, softmax, activation
):
    parent = of_kind(activation)
    shape = {"num_experts": copies * slices, "granularity": slices, "top_k": k}
    gates = {"renormalize": False, "softmax": softmax, "scale": "all"}
    # Raw probabilities need even logits; a softmax over the chosen ones does not.
    even = {"router_std": 0.0 if softmax == "before" else 1.0}
    operation = Upcycle(**shape, **gates, **even)
    assert operation.promise([parent[0]]) == 1e-5
    assert difference(parent, operation) < 1e-5
    expected = copies * slices**2 / k if softmax == "before" else slices
    assert operation.factor() == expected


def test_without_scaling_or_groups_slices_are_not_the_parent():
    parent = of_kind("reglu")
    shape = {"num_experts": 8, "granularity": 2, "top_k": 2}
    unscaled = Upcycle(**shape, scale="none")
    assert unscaled.promise([parent[0]]) is None
    assert difference(parent, unscaled) > 1e-2
    ungrouped = Upcycle(**shape, shuffle=True, router_std=1.0)
    assert difference(parent, ungrouped) > 1e-2


def test_the_error_of_roots_on_swiglu_is_not_promised_away_and_down_alone_is_exact(parent):
    shape = {"num_experts": 8, "granularity": 2, "top_k": 2, "router_std": 1.0}
    roots = Upcycle(**shape, scale="all")
    assert roots.promise([parent[0]]) is None
    assert difference(parent, roots) > 1e-4
    assert difference(parent, Upcycle(**shape, scale="down")) < 1e-5


def test_a_router_that_is_less_even_errs_more():
    parent = of_kind("reglu")
    shape = {"num_experts": 8, "granularity": 2, "top_k": 2, "renormalize": False}
    errors = [difference(parent, Upcycle(**shape, router_std=std)) for std in (0.0, 0.02, 0.2)]
    assert errors[0] < errors[1] < errors[2]


def test_shuffled_slices_add_up_to_every_copy_and_differ_between_copies(parent):
    operation = Upcycle(num_experts=6, granularity=3, top_k=3, shuffle=True)
    _, arrays = result_of(operation, parent)
    dense = parent[1][Place(0, "feed_forward.down_FD")]
    experts = [arrays[Place(0, "feed_forward.down_EFD", e)] for e in range(6)]
    for copy in (experts[:3], experts[3:]):
        rows = np.concatenate(copy)
        np.testing.assert_array_equal(rows[np.lexsort(rows.T)], dense[np.lexsort(dense.T)])
    assert not np.array_equal(experts[0], experts[3])
    # Gate, up and down of a unit stay together.
    gate_up = arrays[Place(0, "feed_forward.gate_up_ED2F", 4)]
    first = np.flatnonzero((dense == experts[4][0]).all(axis=1))[0]
    whole = parent[1][Place(0, "feed_forward.gate_up_D2F")]
    np.testing.assert_array_equal(gate_up[:, 0], whole[:, first])
    np.testing.assert_array_equal(gate_up[:, 8], whole[:, 24 + first])


def test_half_of_the_entries_are_drawn_again(parent):
    operation = Upcycle(num_experts=4, reinit=0.5)
    assert operation.promise([parent[0]]) is None
    _, arrays = result_of(operation, parent)
    dense = parent[1][Place(1, "feed_forward.down_FD")]
    expert = arrays[Place(1, "feed_forward.down_EFD", 2)]
    assert np.mean(expert != dense) == 0.5
    assert np.std(expert[expert != dense]) == pytest.approx(0.3, rel=0.2)
    first = result_of(
        operation, (parent[0], {p: np.abs(x) for p, x in parent[1].items()}), role=Role.SECOND
    )[1]
    moments = first[Place(1, "feed_forward.down_EFD", 2)]
    np.testing.assert_array_equal(moments == 0, expert != dense)


def test_moments_are_those_of_the_feed_forward_and_zero_for_the_router(parent):
    moments = {place: np.full_like(x, 3.0) for place, x in parent[1].items()}
    shape = {"num_experts": 4, "granularity": 2, "top_k": 2}
    for role, factor in ((Role.FIRST, 1 / 2), (Role.SECOND, 1 / 4)):
        _, arrays = result_of(Upcycle(**shape), (parent[0], moments), role=role)
        # Of what is doubled gradients are halved.
        assert (arrays[Place(0, "feed_forward.down_EFD", 1)] == 3.0 * factor).all()
        assert (arrays[Place(0, "feed_forward.gate_up_ED2F", 1)] == 3.0).all()
        assert (arrays[Place(0, "feed_forward.router_DE")] == 0).all()
        assert (arrays[Place(None, "embedding_VD")] == 3.0).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"top_k": 2, "top_p": 0.4}, "two routers"),
        ({"num_experts": 6, "granularity": 4, "top_k": 4}, "must divide --num_experts=6"),
        ({"num_experts": 10, "granularity": 5, "top_k": 5}, "hidden width 24 of layer 0"),
        ({"granularity": 2, "top_k": 3}, "multiple of --granularity=2"),
        ({"granularity": 2, "top_p": 0.4}, "needs --renormalize=true and --granularity=1"),
        ({"layers": "0,7"}, "names '7'"),
        ({"experts_per_token": 9.0}, "from 1 to the 8 experts of a layer"),
    ],
)
def test_what_cannot_be_is_refused_with_the_settings_name(parent, wrong, named):
    with pytest.raises(ConfigError, match=named):
        Upcycle(**wrong).result([parent[0]])


def test_a_model_with_experts_is_refused():
    cfg = settings(moe={"num_experts": 4, "hidden_width": 8})
    with pytest.raises(ConfigError, match="has experts in layers 0, 1"):
        Upcycle().result([cfg])


def test_what_experts_would_lose_of_a_feed_forward_is_refused():
    """Adapters of attention are kept, those of feed-forwards have no place in experts."""
    adapted = settings(linear="lora")
    assert Upcycle().result([adapted]).model.linear == "lora"
    adapted = settings(linear="lora", lora={"targets": "query|down"})
    with pytest.raises(ConfigError, match=r"no feed_forward\.down_lora_FR"):
        Upcycle().result([adapted])


def test_experts_in_some_layers_scan_where_they_repeat():
    cfg = settings(num_layers=4)
    assert Upcycle(layers="1,3").result([cfg]).model.layers == ""
    assert Upcycle(layers="1,3").result([cfg]).model.moe_layers == (1, 3)
    uneven = Upcycle(layers="0,3").result([cfg]).model
    assert uneven.moe_layers == (0, 3)
    assert uneven.layers == "1-2:feed_forward=dense"
