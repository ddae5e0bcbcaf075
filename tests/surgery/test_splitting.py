"""Splitting divides hidden units, and all experts together are the feed-forward.

Axis legend: E experts, F hidden units, D model width, S some tokens.
"""

import numpy as np
import pytest

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.experts.kinds.kind import without_experts
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.partitions import PARTITIONS
from tests.close import assert_close
from tests.in_memory_surgery import drawn, logits, result_of, settings

E, WIDTH = 4, 6
SPLITS = [name for name, kind in EXPERTS.items() if kind.splits_hidden]
FREE = [name for name, kind in PARTITIONS.items() if not kind.statistics]
"""Partitions that need no statistics."""


@pytest.fixture(scope="module")
def parent():
    cfg = settings()
    return cfg, drawn(cfg)


def units_of(parent, operation, layer=0):
    """Numbers of the units of each expert, found by their rows of the last matrix."""
    _, arrays = result_of(operation, parent)
    dense = parent[1][Place(layer, "feed_forward.down_FD")]
    number = {row.tobytes(): unit for unit, row in enumerate(dense)}
    experts = [arrays[Place(layer, "feed_forward.down_EFD", e)] for e in range(E)]
    return [[number[row.tobytes()] for row in rows] for rows in experts]


@pytest.mark.parametrize("by", FREE)
def test_every_unit_is_in_one_expert_and_all_are_of_one_size(parent, by):
    units = units_of(parent, Split(num_experts=E, by=by))
    assert [len(own) for own in units] == [WIDTH] * E
    assert sorted(unit for own in units for unit in own) == list(range(E * WIDTH))
    assert (units == np.arange(E * WIDTH).reshape(E, WIDTH).tolist()) == (by == "contiguous")


@pytest.mark.parametrize("by", FREE)
@pytest.mark.parametrize("activation", SPLITS)
def test_experts_of_any_kind_add_up_to_the_feed_forward(activation, by):
    cfg = settings(activation=activation, num_layers=1)
    parent = cfg, drawn(cfg)
    made, arrays = result_of(Split(num_experts=E, by=by), parent)
    kind = made.model.moe.expert_kind
    names = kind.parameters(1, 1, 1)
    x_SD = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    dense = {name: parent[1][Place(0, f"feed_forward.{without_experts(name)}")] for name in names}
    found = sum(
        kind.apply({name: arrays[Place(0, f"feed_forward.{name}", e)] for name in names}, x_SD)
        for e in range(E)
    )
    assert_close(found, kind.apply(dense, x_SD), 1e-5)


def test_a_model_with_all_experts_on_is_its_parent(parent):
    operation = Split(num_experts=E, by="clusters", layers="1", router_std=1.0)
    assert operation.promise([parent[0]]) == 1e-5
    cfg, arrays = result_of(operation, parent)
    assert cfg.model.moe_layers == (1,)
    assert np.abs(logits(cfg, arrays) - logits(*parent)).max() < 1e-5


def test_even_softmax_gates_weigh_the_chosen_by_llama_moes_factor(parent):
    """(N/k)(1/k) times their sum: of the dense output's size about 1/k, which is said."""
    cfg = settings(num_layers=1)
    parent, k = (cfg, drawn(cfg)), 2
    operation = Split(num_experts=E, top_k=k, gates="softmax", router_std=0.0)
    assert operation.promise([cfg]) is None
    assert "0.5 of what" in operation.remarks([cfg])[1]
    assert "--scale=4" in operation.remarks([cfg])[1]
    # Of even logits, the first experts are taken: the first units of the parent.
    fewer = settings(num_layers=1, hidden_width=k * WIDTH)
    arrays = dict(parent[1])
    place = Place(0, "feed_forward.gate_up_D2F")
    gate_up = arrays[place].reshape(16, 2, E * WIDTH)
    arrays[place] = gate_up[:, :, : k * WIDTH].reshape(16, -1)
    place = Place(0, "feed_forward.down_FD")
    arrays[place] = arrays[place][: k * WIDTH] * (E / k) * (1 / k)
    expected = logits(fewer, arrays)
    assert_close(logits(*result_of(operation, parent)), expected, 1e-5)


@pytest.mark.parametrize(
    ("choice", "factor"),
    [
        ({"by": "contiguous"}, 2.0),
        ({"by": "random"}, 2.0),
        ({"by": "clusters"}, 1.0),
        ({"by": "contiguous", "scale": 3.0}, 3.0),
        ({"by": "contiguous", "top_k": 0}, 1.0),
    ],
    ids=str,
)
def test_the_output_is_scaled_as_the_papers_say(parent, choice, factor):
    made = Split(**{"num_experts": E, "top_k": 2, **choice}).result([parent[0]])
    assert made.model.moe.routed_scale == factor
    assert made.model.moe.route.straight_through


def test_moments_are_permuted_as_parameters_are(parent):
    operation = Split(num_experts=E, by="clusters")
    units = units_of(parent, operation)
    moments = {
        place: np.broadcast_to(np.arange(len(x), dtype=np.float32)[:, None], x.shape)
        if place.array_name == "down_FD"
        else np.broadcast_to(np.arange(x.shape[-1], dtype=np.float32), x.shape)
        for place, x in parent[1].items()
    }
    # Parameters and moments of one parent, as the writer asks for them: choices are of parameters.
    both = {Role.PARAMETER: parent[1], Role.SECOND: moments}
    _, arrays = result_of(operation, (parent[0], both), role=Role.SECOND)
    for e in range(E):
        assert arrays[Place(0, "feed_forward.down_EFD", e)][:, 3].tolist() == units[e]
        gate_up = arrays[Place(0, "feed_forward.gate_up_ED2F", e)][2]
        assert gate_up.tolist() == units[e] + [E * WIDTH + unit for unit in units[e]]
    assert (arrays[Place(0, "feed_forward.router_DE")] == 0).all()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_clusters_recover_planted_groups(activation):
    cfg = settings(activation=activation, num_layers=1)
    parent, planted_F = planted(cfg)
    units = units_of(parent, Split(num_experts=E, by="clusters"))
    assert sorted(map(sorted, units)) == groups(planted_F)


def planted(cfg):
    """A model whose units read, and are on for, one of E groups of dimensions each."""
    random = np.random.default_rng(3)
    planted_F = random.permutation(np.repeat(np.arange(E), WIDTH))
    arrays = drawn(cfg)
    reads_DF = np.repeat(np.eye(E), 16 // E, axis=0)[:, planted_F]
    reads_DF = (reads_DF * random.uniform(0.5, 1.5, (1, E * WIDTH))).astype(np.float32)
    for place in arrays:
        if place.name == "feed_forward.up_DF":
            arrays = {**arrays, place: reads_DF}
        if place.name == "feed_forward.gate_up_D2F":
            gate_up = np.concatenate([reads_DF, arrays[place][:, E * WIDTH :]], axis=1)
            arrays = {**arrays, place: gate_up}
    return (cfg, arrays), planted_F


def groups(planted_F):
    return sorted(np.flatnonzero(planted_F == e).tolist() for e in range(E))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_experts": 5}, "must divide the hidden width 24 of layer 0"),
        ({"num_experts": 4, "top_k": 5}, "--top_k=5 is more than --num_experts=4"),
    ],
)
def test_what_cannot_be_is_refused_with_the_settings_name(parent, wrong, named):
    with pytest.raises(ConfigError, match=named):
        Split(**wrong).result([parent[0]])


def test_gates_of_a_kind_that_has_none_are_refused():
    with pytest.raises(ConfigError, match="ReLU has no such matrix; take --on=up"):
        Split(num_experts=E, by="clusters", on="gate").result([settings(activation="relu")])


def test_settings_of_experts_that_a_dense_parent_kept_have_no_effect():
    cfg = settings(moe={"every_n_layers": 0, "shared_hidden_width": 8, "router": "top_k"})
    made = Split(num_experts=E).result([cfg]).model.moe
    assert made.shared_hidden_width == 0
