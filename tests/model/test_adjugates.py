"""Adjugate experts: one narrow row for each group that a token touches, by hand and by count."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.experts import rows_from_routing
from dynmoe_jax.mesh.make_mesh import check_divides, make_mesh
from dynmoe_jax.model.adjugate import expected_adjugates, routing_of_groups
from dynmoe_jax.model.feed_forward import MoEFeedForward
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.parameters import active_parameters, count_parameters
from dynmoe_jax.routing import Routing, TopK

T, D, E = 8, 16, 8
X_TD = np.random.default_rng(4).normal(size=(T, D)).astype(np.float32)
POSITIONS = TokenPositions(np.ones((T, 1), np.int32), None)
GROVE = {
    "num_experts": E,
    "router": "top_k",
    "top_k": {"k": 4, "renormalize": True},
    "adjugate_width": 4,
}


def moe_of(**changes):
    """Settings of a layer."""
    return config.MoE(hidden_width=12, **(GROVE | changes))


@pytest.fixture(scope="module")
def layer():
    """Grove's feed-forward with parameters of order one."""
    model = config.Model(
        width=D, num_heads=2, num_kv_heads=2, head_width=8, kernels="plain", moe=moe_of()
    )
    structure, shapes = nnx.split(nnx.eval_shape(lambda: MoEFeedForward(model, rngs=nnx.Rngs(0))))
    random = np.random.default_rng(0)
    return nnx.merge(structure, jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(scale=0.4, size=leaf.shape), jnp.float32), shapes
    ))  # fmt: skip


@nnx.jit
def feed(layer):
    return layer(X_TD, X_TD @ layer.router_DE[...], POSITIONS)[0]


def of_groups(expert_TK, weight_TK):
    """The routing of groups of two of a routing that is written down."""
    scores_TE = jnp.zeros((len(expert_TK), E))
    arrays = jnp.asarray(expert_TK, jnp.int32), jnp.asarray(weight_TK, jnp.float32)
    return jax.jit(lambda e, w: routing_of_groups(Routing(e, w, scores_TE, scores_TE, E), 2))(
        *arrays
    )


def test_two_experts_of_a_group_make_one_row_with_their_summed_weight():
    # Token 0: experts 4, 1, 5, of groups 2, 0, 2; token 1: expert 7; token 2: padding.
    found = of_groups([[4, 1, 5], [7, E, E], [E, E, E]], [[0.5, 0.3, 0.2], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found.expert_TK, [[2, 0, 4], [3, 4, 4], [4, 4, 4]])
    np.testing.assert_allclose(found.weight_TK, [[0.7, 0.3, 0], [1, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(rows_from_routing(found).group_size_E, [1, 0, 1, 1])


def test_any_routing_as_by_a_loop():
    random = np.random.default_rng(1)
    expert_TK = np.stack([random.permutation(E)[:6] for _ in range(20)])
    expert_TK[np.arange(6) >= random.integers(0, 7, (20, 1))] = E
    weight_TK = np.where(expert_TK < E, random.uniform(size=expert_TK.shape), 0)
    found = of_groups(expert_TK, weight_TK)
    assert found.num_experts == found.slots == 4  # no more slots than groups
    for token, (experts, weights) in enumerate(zip(expert_TK, weight_TK, strict=True)):
        wanted = {}
        for expert, weight in zip(experts, weights, strict=True):
            if expert < E:
                wanted[expert // 2] = wanted.get(expert // 2, 0) + weight
        used = list(wanted)
        np.testing.assert_array_equal(found.expert_TK[token], used + [4] * (4 - len(used)))
        np.testing.assert_allclose(
            found.weight_TK[token][: len(used)], list(wanted.values()), rtol=1e-5
        )
        assert np.all(found.weight_TK[token][len(used) :] == 0)


def swiglu(x_D, gate_up_D2F, down_FD):
    gate, up = np.split(x_D @ np.asarray(gate_up_D2F, np.float64), 2)
    return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down_FD)


def test_the_layer_is_the_papers_sum(layer):
    logits_TE = X_TD @ np.asarray(layer.router_DE[...])
    wanted_TD = np.zeros((T, D))
    for token, logits_E in enumerate(logits_TE):
        # Chosen by sigmoid, weighed by the softmax over those that are chosen.
        chosen = np.argsort(-1 / (1 + np.exp(-logits_E)))[:4]
        gates = np.exp(logits_E[chosen]) / np.exp(logits_E[chosen]).sum()
        by_group = {}
        for expert, gate in zip(chosen, gates, strict=True):
            matrices = layer.gate_up_ED2F[...][expert], layer.down_EFD[...][expert]
            wanted_TD[token] += gate * swiglu(X_TD[token], *matrices)
            by_group[expert // 2] = by_group.get(expert // 2, 0.0) + gate
        for group, gate in by_group.items():
            narrow = layer.adjugates
            matrices = narrow.gate_up_ED2F[...][group], narrow.down_EFD[...][group]
            wanted_TD[token] += 0.05 * gate * swiglu(X_TD[token], *matrices)
    np.testing.assert_allclose(feed(layer), wanted_TD, atol=1e-5)


def test_adjugates_of_zero_leave_plain_top_k(layer):
    empty, plain = nnx.clone(layer), nnx.clone(layer)
    empty.adjugates.down_EFD = nnx.Param(jnp.zeros_like(layer.adjugates.down_EFD[...]))
    plain.adjugates = None
    np.testing.assert_array_equal(feed(empty), feed(plain))
    assert np.max(np.abs(feed(layer) - feed(plain))) > 1e-3
    assert plain.router == TopK(4, renormalize=True)


def test_eight_devices_compute_what_one_does(layer):
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), 8)
    with jax.set_mesh(mesh):
        together = feed(layer)
    np.testing.assert_allclose(together, feed(layer), rtol=1e-4, atol=1e-5)


def test_expected_groups_are_the_mean_over_all_sets():
    moe = moe_of(num_experts=6)
    for k in (1, 3, 6):
        sets = list(itertools.combinations(range(6), k))
        mean = np.mean([len({expert // 2 for expert in chosen}) for chosen in sets])
        assert expected_adjugates(moe, k) == pytest.approx(mean)


def test_counts_by_hand(small):
    # An adjugate expert of D=16 and width 4 has 3 16 4 = 192 numbers, and two experts share one.
    plain, grove = small(), small(adjugate_width=4)
    assert count_parameters(grove) == count_parameters(plain) + 2 * 2 * 192
    # With two of four experts a token touches 2 (1 - 1/6) = 5/3 of two groups.
    assert active_parameters(grove, 2) == active_parameters(plain, 2) + round(2 * 192 * 5 / 3)
    flops = [forward_flops(model, tokens=10, length=8, rows=40) for model in (grove, plain)]
    assert flops[0] - flops[1] == pytest.approx(2 * 10 * 5 / 3 * 2 * 192)


def test_settings_that_contradict_each_other(small):
    with pytest.raises(config.ConfigError, match=r"adjugate_group=3 must divide .*num_experts=4"):
        config.Config(model=small(adjugate_width=4, adjugate_group=3), data=config.Data(seq_len=8))
    sizes = {"slice": 1, "data": 1, "expert": 4, "model": 1}
    with pytest.raises(config.ConfigError, match=r"expert=4 must divide the 2 groups"):
        check_divides(small(adjugate_width=4), sizes)
    with pytest.raises(config.ConfigError, match=r"model=3 must divide .*adjugate_width=4"):
        check_divides(
            small(adjugate_width=4, num_heads=3, num_kv_heads=3), sizes | {"expert": 1, "model": 3}
        )
