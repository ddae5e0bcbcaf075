"""Regularizers: promises of every registered one, jitter and expert dropout by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.registry import REGULARIZERS, ROUTERS
from dynmoe_jax.routing import Routing, TopK, TopP
from dynmoe_jax.routing.record import DEAD
from dynmoe_jax.routing.regularizers.expert_dropout import ExpertDropout
from dynmoe_jax.routing.regularizers.jitter import Jitter
from dynmoe_jax.routing.routers import ExpertThreshold
from tests.routing.given import D, E, T, given, params_of, replace

WEIGHTS_DE = jax.random.normal(jax.random.key(0), (D, E))
X_TD = jax.random.normal(jax.random.key(1), (T, D))
RUN_KEY = jax.random.key_data(jax.random.key(5))


def scores(x_TD):
    return x_TD @ WEIGHTS_DE


def seen_by(router, step=0, key=RUN_KEY, valid_T=None):
    """The input of a router, with all that regularizers may read."""
    seen = given(router, scores(X_TD), valid_T, training=True, x_TD=X_TD, params=params_of(router))
    keys_T2 = jax.vmap(lambda i: jax.random.key_data(jax.random.key(i)))(jnp.arange(T))
    return replace(
        seen, key_T=keys_T2, run_key=key, step=jnp.int32(step), num_experts=E, training=True
    )


@pytest.mark.parametrize("regularizer", [k() for k in REGULARIZERS.values()], ids=REGULARIZERS)
def test_what_stands_keeps_the_promises_of_a_routing_and_padding_counts_nowhere(regularizer):
    valid_T = jnp.arange(T) % 3 != 0
    router = TopK(2)
    seen = seen_by(router, valid_T=valid_T)
    poisoned_TD = jnp.where(valid_T[:, None], X_TD, jnp.nan)

    def weights(x_TD):
        changed = regularizer(replace(seen, x_TD=x_TD, logits_TE=scores(x_TD)), scores)
        routing = regularizer.behind(router({}, changed), changed)
        return jnp.sum(jnp.where(routing.used_TK, routing.weight_TK**2, 0.0)), routing

    total, routing = weights(poisoned_TD)
    assert np.isfinite(total)
    assert not np.any(np.asarray(routing.used_TK)[~np.asarray(valid_T)])
    used_TK = np.asarray(routing.used_TK)
    assert np.all(used_TK[:, :-1] >= used_TK[:, 1:])
    np.testing.assert_array_equal(routing.expert_TK, weights(X_TD)[1].expert_TK)


def test_jitter_multiplies_what_the_router_reads_by_uniform_noise():
    seen = seen_by(TopK(2))
    changed = Jitter(0.1)(seen, scores)
    ratio_TD = np.asarray(changed.x_TD / seen.x_TD)
    assert 0.9 <= ratio_TD.min() < 0.92
    assert 1.08 < ratio_TD.max() <= 1.1
    assert len(np.unique(ratio_TD)) > T * D - 3
    np.testing.assert_allclose(changed.logits_TE, scores(changed.x_TD), rtol=1e-6)
    np.testing.assert_array_equal(Jitter(0.0)(seen, scores).logits_TE, seen.logits_TE)


ROUTERS_OF_LOGITS = {
    name: kind()
    for name, kind in ROUTERS.items()
    if kind().causal and kind().logits is None
}  # fmt: skip


@pytest.mark.parametrize("router", ROUTERS_OF_LOGITS.values(), ids=ROUTERS_OF_LOGITS)
def test_no_router_routes_to_a_dead_expert(router):
    dropout = ExpertDropout(rate=0.5, clusters=2)
    assert dropout.obstacle(E, 2) is None
    seen = seen_by(router)
    alive_E = np.asarray(dropout.alive_E(seen, E))
    changed = dropout(seen, scores)
    routing = router(params_of(router), changed)
    if not isinstance(routing, Routing):
        with pytest.raises(ConfigError, match="regularizers='expert_dropout' has no effect"):
            dropout.behind(routing, changed)
        return
    load_E = np.asarray(dropout.behind(routing, changed).load_E)
    assert np.all(load_E[~alive_E] == 0)
    assert load_E[alive_E].sum() > 0


@pytest.mark.parametrize(
    ("experts", "clusters", "rate"), [(10, 2, 0.5), (16, 4, 0.25), (8, 1, 0.5), (10, 1, 0.9)]
)
def test_within_clusters_the_same_places_of_each_are_left(experts, clusters, rate):
    dropout = ExpertDropout(rate=rate, clusters=clusters, interval=4)
    size = experts // clusters
    left = {(10, 2, 0.5): 2, (16, 4, 0.25): 3, (8, 1, 0.5): 4, (10, 1, 0.9): 1}
    patterns = []
    for step in range(40):
        alive_E = np.asarray(dropout.alive_E(seen_by(TopK(1), step), experts))
        of_clusters = alive_E.reshape(clusters, size)
        assert np.all(of_clusters == of_clusters[0])
        assert of_clusters[0].sum() == left[experts, clusters, rate]
        assert alive_E.sum() == dropout.alive(experts)
        patterns.append(tuple(alive_E))
    blocks = [set(patterns[i : i + 4]) for i in range(0, 40, 4)]
    assert all(len(block) == 1 for block in blocks)
    assert len(set(patterns)) > 1


@pytest.mark.parametrize(("clusters", "rate"), [(4, 0.5), (8, 0.3), (2, 0.4)])
def test_whole_clusters_are_left(clusters, rate):
    dropout = ExpertDropout(rate=rate, clusters=clusters, mode="whole_cluster")
    alive_CL = np.asarray(dropout.alive_E(seen_by(TopK(1)), 16)).reshape(clusters, -1)
    full = clusters - math.floor(rate * clusters)
    assert np.all(alive_CL == alive_CL[:, :1])
    assert alive_CL[:, 0].sum() == full


def test_a_draw_is_a_function_of_seed_layer_and_interval():
    dropout = ExpertDropout(interval=10)
    pattern = lambda step, key: tuple(  # noqa: E731
        np.asarray(dropout.alive_E(seen_by(TopK(1), step, key), 16))
    )
    other = jax.random.key_data(jax.random.key(6))
    assert pattern(13, RUN_KEY) == pattern(17, RUN_KEY)
    assert len({pattern(10 * i, RUN_KEY) for i in range(8)}) > 4
    assert any(pattern(10 * i, RUN_KEY) != pattern(10 * i, other) for i in range(3))


def test_tokens_choose_among_the_living_by_their_renormalized_probabilities():
    dropout, router = ExpertDropout(rate=0.5), TopP(0.6)
    seen = seen_by(router)
    alive_E = np.asarray(dropout.alive_E(seen, E))
    probs_TE = np.asarray(router({}, dropout(seen, scores)).probs_TE)
    wanted_TE = np.exp(np.asarray(seen.logits_TE)) * alive_E
    np.testing.assert_allclose(probs_TE, wanted_TE / wanted_TE.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.9}, "expert_dropout.rate=0.9 must leave at least 2 of .*num_experts=8"),
        ({"clusters": 3}, "expert_dropout.clusters=3 must divide config.model.moe.num_experts=8"),
    ],
)
def test_what_leaves_too_few_is_refused(settings, message):
    moe = config.MoE(
        router="top_k", num_experts=8, regularizers="expert_dropout", expert_dropout=settings
    )
    with pytest.raises(ConfigError, match=message):
        config.Config(model=dataclasses.replace(config.Model(), moe=moe))


def test_normalized_logits_are_those_of_the_living():
    router, dropout = TopP(normalize_logits=True), ExpertDropout(0.5)
    seen = seen_by(router)
    alive_E = np.asarray(dropout.alive_E(seen, E))
    routing = router(params_of(router), dropout(seen, scores))
    living = replace(seen, logits_TE=seen.logits_TE[:, alive_E])
    wanted = router(params_of(router), living)
    np.testing.assert_allclose(routing.probs_TE[:, alive_E], wanted.probs_TE, rtol=1e-5)
    np.testing.assert_array_equal(routing.probs_TE[:, ~alive_E], 0)


def test_the_next_layer_reads_no_logit_of_a_dead_expert():
    positions = TokenPositions(jnp.ones((1, 2), int), jnp.zeros((1, 2, 4)))
    positions = positions.with_previous(jnp.zeros((1, 2, 4)))
    behind = positions.behind(jnp.array([[1.0, DEAD, -2.0], [DEAD, 3.0, 4.0]]), 3)
    np.testing.assert_array_equal(behind.previous_BLS[0], [[1, 0, -2, 0], [0, 3, 4, 0]])


@pytest.mark.parametrize("over", ["microbatch", "batch"])
def test_a_dead_expert_keeps_its_cut_off(over):
    router, dropout = ExpertThreshold(decay=0.5, warmup_steps=0, over=over), ExpertDropout(0.5)
    seen, first = seen_by(router), jnp.arange(E, dtype=jnp.float32)
    seen = replace(seen, state=seen.state | {"cut_E": first, "updates": jnp.int32(3)})
    alive_E = np.asarray(dropout.alive_E(seen, E))
    disturbed = dropout(seen, scores)
    measured = router.measure({}, disturbed, router({}, disturbed))
    stack = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    state, _ = router.next_state({}, stack(seen.state), stack(measured))
    np.testing.assert_array_equal(state["cut_E"][0, ~alive_E], first[~alive_E])
    assert np.all(state["cut_E"][0, alive_E] != first[alive_E])
