"""Top-any gating: thresholds, weights and their slopes, experts that come and go, diversity."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import TopAny

T, E, D = 20, 4, 8
ROUTER = TopAny(wait=0, window=2, rest=1)
VECTORS_DE = jnp.eye(D)[:, :E]


def draw(seed=0, tokens=T):
    return jax.random.normal(jax.random.key(seed), (tokens, D))


def params_of(vectors_DE=VECTORS_DE, threshold_E=(0.0, 0.4, -0.4, 0.0)):
    return {"router_DE": vectors_DE, "threshold_E": jnp.array(threshold_E)}


def state_of(live_E=(1, 1, 1, 1)):
    return ROUTER.layer_state(D, E) | {"live_E": jnp.array(live_E, jnp.float32)}


@partial(jax.jit, static_argnames=("training", "router"))
def choose(params, x_TD, state, valid_T=None, training=True, router=ROUTER):
    """(routing, what is measured of it, the input)."""
    valid_T = jnp.ones(len(x_TD), bool) if valid_T is None else valid_T
    logits_TE = router.logits(params, x_TD, E)
    seen = RouterInput(x_TD, logits_TE, valid_T, state, training=training)
    routing = router(params, seen)
    return routing, router.measure(params, seen, routing), seen


def after(params, state, *measures):
    """(state, parameters) of one layer after updates."""
    stack = partial(jax.tree.map, lambda x: x[None])
    step = jax.jit(ROUTER.next_state)
    params, state = stack(params), stack(state)
    for seen in measures:
        state, params = step(params, state, stack(seen))
    return jax.tree.map(lambda x: x[0], (state, params))


def test_a_token_takes_the_experts_above_their_thresholds_each_weighed_by_one_over_n():
    live = np.array([True, True, True, False])
    routing, _, _ = choose(params_of(), draw(), state_of(live))
    x_TD, sigmoid = np.asarray(draw()), lambda z: 1 / (1 + np.exp(-z))
    cosine_TE = x_TD[:, :E] / np.linalg.norm(x_TD, axis=1, keepdims=True)
    used_TE = (sigmoid(cosine_TE) > sigmoid(np.array([0, 0.4, -0.4, 0]))) & live
    np.testing.assert_array_equal(routing.chosen_TE, used_TE)
    assert set(used_TE.sum(1)) == {0, 1, 2, 3}
    wanted_TK = np.arange(E) < used_TE.sum(1, keepdims=True)
    wanted_TK = wanted_TK / np.maximum(used_TE.sum(1, keepdims=True), 1)
    np.testing.assert_array_equal(routing.weight_TK, wanted_TK.astype(np.float32))
    scores_TE = np.where(live, sigmoid(cosine_TE), 0)
    wanted_TE = scores_TE / scores_TE.sum(1, keepdims=True)
    np.testing.assert_allclose(routing.probs_TE, wanted_TE, rtol=1e-5)


def test_whom_no_expert_takes_has_the_best_one_at_inference_alone():
    params, state = params_of(threshold_E=(3.0,) * E), state_of((1, 0, 1, 1))
    valid_T = jnp.arange(T) != 3
    assert not np.any(choose(params, draw(), state, valid_T)[0].used_TK)
    routing, _, seen = choose(params, draw(), state, valid_T, training=False)
    best_T = np.argmax(np.where([1, 0, 1, 1], seen.logits_TE, -9), axis=1)
    np.testing.assert_array_equal(routing.experts_per_token_T, valid_T)
    np.testing.assert_array_equal(routing.expert_TK[:, 0], np.where(valid_T, best_T, E))
    np.testing.assert_array_equal(routing.weight_TK[:, 0], valid_T.astype(np.float32))


@pytest.mark.parametrize("learned", [False, True])
def test_the_scale_multiplies_cosines_and_thresholds(learned):
    router = TopAny(scale=10.0, learned_scale=learned)
    declared = router.parameters(D, E)
    params, key = params_of(), jax.random.key(0)
    if learned:
        params["log_scale_1"] = declared["log_scale_1"].init(key, declared["log_scale_1"].shape)
    scaled, _, seen = choose(params, draw(), state_of(), router=router)
    plain, _, plainly = choose(params_of(), draw(), state_of())
    np.testing.assert_allclose(seen.logits_TE, 10 * plainly.logits_TE, rtol=1e-5)
    np.testing.assert_array_equal(scaled.chosen_TE, plain.chosen_TE)  # sigmoids keep the order
    if learned:
        params["log_scale_1"] += 10
        capped = choose(params, draw(), state_of(), router=router)[2].logits_TE
        np.testing.assert_allclose(capped, 100 * plainly.logits_TE, rtol=1e-4)
    vectors_DE = declared["router_DE"].init(key, (D, E))
    np.testing.assert_allclose(vectors_DE.T @ vectors_DE, np.eye(E), atol=1e-5)


def test_slopes_are_those_of_active_experts_alone():
    x_TD = jnp.array([[1.0, 0.2, -0.1, 1.0, 0, 0, 0, 0]])
    value_E = jnp.array([1.0, 2.0, 3.0, 4.0])

    def output(params):
        routing = choose(params, x_TD, state_of((1, 1, 1, 0)))[0]
        values = jnp.append(value_E, 0)[routing.expert_TK]
        return jnp.sum(routing.weight_TK * values), routing

    (_, routing), slope = jax.value_and_grad(output, has_aux=True)(params_of())
    active_E = np.asarray(routing.chosen_TE)[0]
    np.testing.assert_array_equal(active_E, [True, False, True, False])
    # y = 1/n sum a_e v_e, a through its sign, s_e - sigmoid(G_e): -v_e sigmoid'(G_e) / n.
    threshold_E = jax.nn.sigmoid(params_of()["threshold_E"])
    wanted_E = -value_E * threshold_E * (1 - threshold_E) / active_E.sum() * active_E
    np.testing.assert_allclose(slope["threshold_E"], wanted_E, rtol=1e-5)
    assert np.all((np.asarray(slope["threshold_E"]) != 0) == active_E)
    assert np.all(np.any(np.asarray(slope["router_DE"]) != 0, axis=0) == active_E)


def planted():
    """Tokens that experts 0 and 1 take, and a cluster beyond all vectors."""
    known_TD = jnp.eye(D)[jnp.arange(T // 2) % 2] + 0.01 * jnp.abs(draw())[: T // 2]
    direction_D = jnp.array([0, 0, 0, 0, 1.0, -2, 0.5, 0])
    noise_TD = 0.1 * draw(1)[: T // 2].at[:, :E].set(0)
    return known_TD, direction_D + noise_TD


def test_an_expert_is_born_where_tokens_had_none():
    known_TD, cluster_TD = planted()
    x_TD = jnp.concatenate([known_TD, cluster_TD])
    params, state = params_of(threshold_E=(0.0, 0.0, 0.0, 0.5)), state_of((1, 1, 1, 0))
    routing, seen, _ = choose(params, x_TD, state)
    assert not np.any(routing.experts_per_token_T[T // 2 :])
    assert np.all(routing.experts_per_token_T[: T // 2])
    before, same = after(params, state, seen)
    np.testing.assert_array_equal(before["live_E"], state["live_E"])  # only once it has recorded
    jax.tree.map(np.testing.assert_array_equal, same, params)
    state, params = after(params, state, seen, seen)
    np.testing.assert_array_equal(state["live_E"], [1, 1, 1, 1])
    mean_D = np.mean(cluster_TD, axis=0)
    born_D = np.asarray(params["router_DE"][:, 3])
    np.testing.assert_allclose(np.linalg.norm(born_D), 1, rtol=1e-5)
    assert born_D @ mean_D / np.linalg.norm(mean_D) > 0.99
    assert params["threshold_E"][3] == 0
    np.testing.assert_array_equal(params["router_DE"][:, :3], VECTORS_DE[:, :3])
    assert np.all(choose(params, x_TD, state)[0].chosen_TE[T // 2 :, 3])
    for name in ("routed_E", "unrouted", "unrouted_D"):
        assert not np.any(state[name])


def test_an_expert_that_nobody_uses_is_removed_and_learns_nothing_more():
    known_TD, _ = planted()
    x_TD = jnp.pad(known_TD[:, :3], [(0, 0), (0, D - 3)])  # nothing of expert 3
    params = params_of(threshold_E=(0.0, 0.0, 0.0, 0.0))
    seen = choose(params, x_TD, state_of())[1]
    state, _ = after(params, state_of(), seen, seen)
    np.testing.assert_array_equal(state["live_E"], [1, 1, 1, 0])
    assert ROUTER.shown(state) == {"live_experts": 3}
    x_TD = x_TD.at[:, 3].set(1.0)  # now all are like it
    assert np.all(choose(params, x_TD, state_of())[0].chosen_TE[:, 3])
    value_E = jax.random.normal(jax.random.key(0), (E,))

    def loss(params, value_E):
        routing, _, given = choose(params, x_TD, state)
        y_T = jnp.sum(routing.weight_TK * jnp.append(value_E, 0)[routing.expert_TK], axis=-1)
        parts = LOSSES["diversity"]().sums(routing, given, params)
        balance = LOSSES["balance"]()
        even = balance.value(balance.sums(routing, given, params), jnp.float32(T))
        return jnp.sum(y_T**2) + parts["diversity"] + even

    slope, of_values_E = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, value_E)
    assert not np.any(slope["router_DE"][:, 3])
    assert slope["threshold_E"][3] == 0
    assert of_values_E[3] == 0
    assert np.all(of_values_E[:2])


def test_an_expert_of_more_tokens_than_32_bits_count_stays():
    state = state_of() | {"routed_E": jnp.array([2**30, 1, 1, 0], jnp.int32)}
    seen = {
        "routed_E": jnp.array([2**30 - 1, 0, 0, 0], jnp.int32),
        "unrouted": jnp.int32(0),
        "unrouted_D": jnp.zeros(D),
    }
    state, _ = after(params_of(), state, seen, seen)
    np.testing.assert_array_equal(state["live_E"], [1, 1, 1, 0])


def test_nothing_is_recorded_outside_of_its_time_and_all_stay_where_nobody_got_anything():
    router = TopAny(wait=1, window=2, rest=1)
    stack = partial(jax.tree.map, lambda x: x[None])
    only_first = {"routed_E": jnp.array([1, 0, 0, 0]), "unrouted": jnp.int32(0),
                  "unrouted_D": jnp.zeros(D)}  # fmt: skip
    others = only_first | {"routed_E": jnp.array([0, 1, 1, 1])}
    nothing = jax.tree.map(jnp.zeros_like, only_first)
    step = jax.jit(router.next_state)

    def live(*measures):
        params, state, found = stack(params_of()), stack(state_of()), []
        for seen in measures:
            state, params = step(params, state, stack(seen))
            found.append(np.asarray(state["live_E"][0]).tolist())
        return found

    every, first = [1, 1, 1, 1], [1, 0, 0, 0]
    assert live(others, only_first, only_first, others) == [every, every, first, first]
    assert live(only_first, only_first, others, others) == [every, every, every, every]
    assert live(others, nothing, nothing, nothing) == [every] * 4
    assert TopAny(window=0).next_state({}, state_of(), nothing)[1] is None


def test_diversity_is_that_of_the_experts_that_are_there():
    vectors_DE = jax.random.normal(jax.random.key(5), (D, E))
    live_E = np.array([1, 0, 1, 1])
    routing, _, seen = choose(params_of(vectors_DE), draw(), state_of(live_E))
    kept_DE = np.asarray(vectors_DE)[:, live_E > 0]
    length_E = np.linalg.norm(kept_DE, axis=0)
    unit_DE = kept_DE / length_E
    wanted = np.linalg.norm(unit_DE.T @ unit_DE - np.eye(3)) + length_E.mean()
    loss = LOSSES["diversity"]()
    value = loss.value(loss.sums(routing, seen, params_of(vectors_DE)), jnp.float32(T))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    # Orthogonal vectors, as at the start, have a slope that is finite.
    slope = jax.grad(lambda w: loss.sums(routing, seen, {"router_DE": w})["diversity"])(VECTORS_DE)
    assert np.all(np.isfinite(slope))
