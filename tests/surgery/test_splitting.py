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
from dynmoe_jax.surgery.experts.controls import Division, lost_by_division
from dynmoe_jax.surgery.operations.split import Split
from dynmoe_jax.surgery.partitions import PARTITIONS
from tests.close import assert_close
from tests.in_memory_surgery import drawn, logits, made_by, result_of, settings

E, WIDTH = 4, 6
SPLITS = [name for name, kind in EXPERTS.items() if kind.splits_hidden]


def statistic(name, layer):
    """Something that a calibration could have gathered of a model of E x WIDTH units."""
    random, units = np.random.default_rng([layer, 5]), E * WIDTH
    if name == "gradient_importance":
        return random.exponential(size=(E, units)).astype(np.float32)
    on_TF = np.maximum(random.standard_normal((50, units)), 0)
    return (on_TF.T @ on_TF).astype(np.float32)


@pytest.fixture(scope="module")
def parent():
    cfg = settings()
    return cfg, drawn(cfg)


def feed_forward(cfg, seed=0):
    """(settings, arrays of the feed-forward of layer 0 by place): all that a split reads."""
    model, random = cfg.model, np.random.default_rng(seed)
    shapes = model.feed_forward_kind.parameters(model.width, 1, model.hidden_width)
    return cfg, {
        Place(0, f"feed_forward.{without_experts(name)}"): random.standard_normal(
            each.shape[1:], np.float32
        )
        for name, each in shapes.items()
    }


def dense_weights(parent):
    """Arrays of the feed-forward in layer 0 by the names that experts of its kind have."""
    names = parent[0].model.feed_forward_kind.parameters(1, 1, 1)
    return {n: parent[1][Place(0, f"feed_forward.{without_experts(n)}")] for n in names}


def experts_of(operation, parent, **more):
    """(kind, arrays of each expert by name) in layer 0."""
    cfg, array = made_by(operation, parent, **more)
    kind = cfg.model.by_layer[0].model.moe.expert_kind
    names = kind.parameters(1, 1, 1)
    return kind, [{n: array(Place(0, f"feed_forward.{n}", e)) for n in names} for e in range(E)]


def units_of(parent, operation, layer=0, gathered=statistic, findings=None):
    """Numbers of the units of each expert, found by their rows of the last matrix."""
    _, array = made_by(operation, parent, statistic=gathered, findings=findings)
    dense = parent[1][Place(layer, "feed_forward.down_FD")]
    number = {row.tobytes(): unit for unit, row in enumerate(dense)}
    experts = [array(Place(layer, "feed_forward.down_EFD", e)) for e in range(E)]
    return [[number[row.tobytes()] for row in rows] for rows in experts]


@pytest.mark.parametrize("by", PARTITIONS)
def test_every_unit_is_in_one_expert_and_all_are_of_one_size(parent, by):
    units = units_of(parent, Split(num_experts=E, by=by))
    assert [len(own) for own in units] == [WIDTH] * E
    assert sorted(unit for own in units for unit in own) == list(range(E * WIDTH))
    assert (units == np.arange(E * WIDTH).reshape(E, WIDTH).tolist()) == (by == "contiguous")


@pytest.mark.parametrize("activation", SPLITS)
def test_experts_of_any_kind_add_up_to_the_feed_forward(activation):
    parent = feed_forward(settings(activation=activation))
    kind, experts = experts_of(Split(num_experts=E, by="random"), parent)
    x_SD = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    found = sum(kind.apply(own, x_SD) for own in experts)
    assert_close(found, kind.apply(dense_weights(parent), x_SD), 1e-5)


def test_a_model_with_all_experts_on_is_its_parent(parent):
    operation = Split(num_experts=E, by="clusters", layers="1", router_std=1.0)
    assert operation.promise([parent[0]]) == 1e-5
    cfg, arrays = result_of(operation, parent)
    assert cfg.model.moe_layers == (1,)
    assert np.abs(logits(cfg, arrays) - logits(*parent)).max() < 1e-5


def test_even_softmax_gates_weigh_the_chosen_by_llama_moes_factor(parent):
    """(N/k)(1/k) times their sum: of the dense output's size about 1/k, which is said."""
    k = 2
    operation = Split(num_experts=E, top_k=k, gates="softmax", router_std=0.0, controls=False)
    assert operation.promise([parent[0]]) is None
    assert "0.5 of what" in operation.remarks([parent[0]])[1]
    assert "--scale=4" in operation.remarks([parent[0]])[1]
    # Of even logits, the first experts are taken: the first units of the parent.
    arrays = dict(parent[1])
    for layer in range(2):
        place = Place(layer, "feed_forward.down_FD")
        arrays[place] = arrays[place] * (E / k) * (1 / k)
        arrays[place][k * WIDTH :] = 0
    assert_close(logits(*result_of(operation, parent)), logits(parent[0], arrays), 1e-5)


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
    _, array = made_by(operation, (parent[0], both), role=Role.SECOND)
    for e in range(E):
        assert array(Place(0, "feed_forward.down_EFD", e))[:, 3].tolist() == units[e]
        gate_up = array(Place(0, "feed_forward.gate_up_ED2F", e))[2]
        assert gate_up.tolist() == units[e] + [E * WIDTH + unit for unit in units[e]]
    assert (array(Place(0, "feed_forward.router_DE"), (16, E)) == 0).all()


@pytest.mark.parametrize("by", ["clusters", "coactivation"])
@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_planted_groups_are_found_and_the_one_that_is_on_gives_all_of_the_output(activation, by):
    parent, planted_F = planted(settings(activation=activation))
    # Tokens of one group of dimensions each, for which the units of that group are on.
    random = np.random.default_rng(4)
    group_S = random.integers(0, E, 40)
    x_SD = random.uniform(0.1, 1, (40, 16)) * np.repeat(np.eye(E), 16 // E, axis=1)[group_S]
    kind, dense = parent[0].model.feed_forward_kind, dense_weights(parent)
    on_SF = np.maximum(kind.hidden(dense, x_SD)[0], 0)
    operation = Split(num_experts=E, by=by)
    gathered = lambda name, layer: on_SF.T @ on_SF  # noqa: E731
    units = units_of(parent, operation, gathered=gathered)
    assert sorted(map(sorted, units)) == groups(planted_F)
    # An oracle picks the expert of most activation: with the others left out nothing is lost.
    _, experts = experts_of(operation, parent, statistic=gathered)
    best_S = np.stack([on_SF[:, own].sum(axis=1) for own in units], axis=1).argmax(axis=1)
    kept_SD = np.zeros(x_SD.shape, np.float32)
    for e, own in enumerate(experts):
        kept_SD[best_S == e] = kind.apply(own, x_SD[best_S == e])
    assert_close(kept_SD, kind.apply(dense, x_SD), 1e-5)


def test_planted_experts_lose_nothing_that_is_their_groups_and_controls_do():
    parent, _ = planted(settings(activation="relu"))
    group_S = np.random.default_rng(4).integers(0, E, 40)
    x_SD = np.repeat(np.eye(E), 16 // E, axis=1)[group_S]
    operation, found = Split(num_experts=E, by="clusters", top_k=1), {}
    assert operation.wanted([parent[0]]).names == {"ffn_input_samples"}
    units_of(parent, operation, gathered=lambda name, layer: x_SD, findings=found)
    own, *controls = (found[0][name] for name in operation.choices)
    assert own == pytest.approx(0, abs=1e-6)
    assert min(controls) > 0.1


def test_what_is_lost_is_what_no_factor_makes_up_for(parent):
    """Of two experts with shared units, by hand."""
    kind, weights = parent[0].model.feed_forward_kind, dense_weights(parent)
    x_SD = np.random.default_rng(1).standard_normal((30, 16)).astype(np.float32)
    hidden_SF = np.asarray(kind.hidden(weights, x_SD)[1])
    experts, shared = [np.arange(10), np.arange(10, 20)], np.arange(20, 24)
    found = lost_by_division(
        kind, weights, x_SD, Division(experts, shared), 1, np.random.default_rng(0)
    )
    used_SF = np.zeros_like(hidden_SF)
    used_SF[:, shared] = 1
    for own_F, hidden_F in zip(used_SF, np.abs(hidden_SF), strict=True):
        own_F[max(experts, key=lambda units: hidden_F[units].sum())] = 1
    whole, part = (np.ravel(h @ weights["down_EFD"]) for h in (hidden_SF, hidden_SF * used_SF))
    (factor,), (error,), *_ = np.linalg.lstsq(part[:, None], whole, rcond=None)
    assert factor > 0
    assert found["these experts"] == pytest.approx(error / (whole @ whole), rel=1e-4)
    assert all(0 < lost < 1 for lost in found.values())


def test_shared_units_are_counted(parent):
    operation = Split(num_experts=E, by="importance", share="inner")
    assert operation.promise([parent[0]]) is None
    for layer in range(2):
        found = {}
        units = units_of(parent, operation, layer, findings=found)
        importance_EF = statistic("gradient_importance", layer)
        for e, own in enumerate(units):
            assert own == sorted(np.argsort(importance_EF[e])[-WIDTH:].tolist())
        often = np.bincount([unit for own in units for unit in own], minlength=E * WIDTH)
        assert often.sum() == E * WIDTH
        counts = {"different units": (often > 0).sum(), "in several experts": (often > 1).sum()}
        assert found == {layer: counts}
        assert 0 < counts["in several experts"] < WIDTH * E


def test_a_shared_expert_has_what_most_experts_want_and_all_of_it_is_the_parent(parent):
    operation = Split(num_experts=E, by="importance", share="inter", layers="0")
    assert operation.promise([parent[0]]) == 1e-5
    cfg, arrays = result_of(operation, parent, statistic=statistic)
    # 24 units: 4 experts of 4, and the 8 that are left.
    assert (cfg.model.moe.hidden_width, cfg.model.moe.shared_hidden_width) == (4, 8)
    dense = parent[1][Place(0, "feed_forward.down_FD")]
    shared = arrays[Place(0, "feed_forward.shared_down_FD")]
    own = [int(np.flatnonzero((dense == row).all(axis=1))[0]) for row in shared]
    chosen = np.argsort(-statistic("gradient_importance", 0), axis=1)[:, :4]
    often = np.bincount(chosen.ravel(), minlength=E * WIDTH)
    assert min(often[own]) >= max(np.delete(often, own))
    assert np.abs(logits(cfg, arrays) - logits(*parent)).max() < 1e-5


def planted(cfg):
    """A model whose units read, and are on for, one of E groups of dimensions each."""
    random = np.random.default_rng(3)
    planted_F = random.permutation(np.repeat(np.arange(E), WIDTH))
    arrays = feed_forward(cfg)[1]
    reads_DF = np.repeat(np.eye(E), 16 // E, axis=0)[:, planted_F]
    reads_DF = (reads_DF * random.uniform(0.5, 1.5, (1, E * WIDTH))).astype(np.float32)
    for place, array in arrays.items():
        if place.array_name == "up_DF":
            arrays[place] = reads_DF
        if place.array_name == "gate_up_D2F":
            arrays[place] = np.concatenate([reads_DF, array[:, E * WIDTH :]], axis=1)
    return (cfg, arrays), planted_F


def groups(planted_F):
    return sorted(np.flatnonzero(planted_F == e).tolist() for e in range(E))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_experts": 5}, "must divide the hidden width 24 of layer 0"),
        (
            {"num_experts": 4, "by": "importance", "share": "inter", "shared_width": 5},
            "hidden width 24 less --shared_width=5",
        ),
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
