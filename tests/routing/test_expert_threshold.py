"""Expert thresholds: quantiles that move, a warm-up, a guard, and causality behind them."""

import dataclasses
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.mesh.sharding import by_token
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import ExpertThreshold

T, E = 24, 4
READY = ExpertThreshold(warmup_steps=0)

choose = jax.jit(lambda router, seen: router({}, seen), static_argnums=0)


@partial(jax.jit, static_argnums=1)
def measured(seen, router=READY):
    return router.measure({}, seen, router({}, seen))


def draw(seed=0, tokens=T):
    return jax.random.normal(jax.random.key(seed), (tokens, E))


def seen_of(logits_TE, state, valid_T=None, training=True):
    valid_T = jnp.ones(len(logits_TE), bool) if valid_T is None else valid_T
    return RouterInput(None, logits_TE, valid_T, state, training=training)


def state_of(cut_E=(0.0,) * E, updates=1):
    state = READY.initial_state(E)
    return state | {"cut_E": jnp.array(cut_E), "updates": jnp.int32(updates)}


def stacked(tree):
    return jax.tree.map(lambda x: x[None], tree)


def after(router, state, *measures):
    """The state of one layer after an update by microbatches."""
    seen = jax.tree.map(lambda *x: sum(x), *measures)
    state, _ = router.next_state({}, stacked(state), stacked(seen))
    return jax.tree.map(lambda x: x[0], state)


def measure(logits_TE, valid_T=None, router=READY, state=None):
    seen = seen_of(logits_TE, state or state_of(), valid_T)
    return measured(seen, router)


def kth(logits_TE, k):
    return np.sort(np.asarray(logits_TE), axis=0)[-k]


def test_a_token_takes_the_experts_above_their_cuts_weighed_by_sigmoids():
    cut_E = np.array([-0.5, 0.0, 0.5, 9.0], np.float32)
    routing = choose(READY, seen_of(draw(), state_of(cut_E), training=False))
    logits_TE = np.asarray(draw())
    np.testing.assert_array_equal(routing.chosen_TE, logits_TE > cut_E)
    assert 0 in np.asarray(routing.experts_per_token_T)
    for experts, weights, logits in zip(
        routing.expert_TK, routing.weight_TK, logits_TE, strict=True
    ):
        passed = sorted(np.flatnonzero(logits > cut_E), key=lambda e: -logits[e])
        assert list(experts[: len(passed)]) == passed
        np.testing.assert_allclose(weights[: len(passed)], 1 / (1 + np.exp(-logits[passed])), 1e-6)


def test_experts_take_their_best_tokens_until_thresholds_are_warm():
    router = ExpertThreshold(warmup_steps=3)
    for updates in (0, 2, 3):
        chosen_TE = choose(router, seen_of(draw(), state_of(updates=updates))).chosen_TE
        best_TE = np.asarray(draw()) >= kth(draw(), T // E)
        assert np.array_equal(chosen_TE, best_TE) == (updates < 3)
    # Without any cut-off experts choose, whatever the settings say.
    assert np.array_equal(choose(READY, seen_of(draw(), state_of(updates=0))).chosen_TE, best_TE)


def test_inference_never_goes_by_the_warm_up_or_the_guard():
    router = ExpertThreshold(warmup_steps=100, guard=0.1)
    for updates in (0, 5, 1000):
        seen = seen_of(draw(), state_of((-9.0,) * E, updates), training=False)
        assert np.all(choose(router, seen).chosen_TE)


@pytest.mark.parametrize(("updates", "training", "causal"), [(0, True, False), (9, True, True),
                                                             (0, False, True)])  # fmt: skip
def test_later_tokens_count_in_the_warm_up_alone(updates, training, causal):
    router = ExpertThreshold(warmup_steps=5, guard=0.0)
    other_TE = draw().at[T // 2 :].set(5.0)
    chosen = [
        np.asarray(choose(router, seen_of(z, state_of(updates=updates), None, training)).chosen_TE)
        for z in (draw(), other_TE)
    ]
    assert np.array_equal(chosen[0][: T // 2], chosen[1][: T // 2]) == causal


def test_the_guard_bounds_what_an_expert_takes_by_its_highest_scores_and_counts_the_rest():
    k = T // E  # 6: between 3 and 9
    order_T = np.random.default_rng(0).permutation(T)
    demands = np.array([18, 6, 0, 9])
    logits_TE = jnp.array([[demand - i - 0.5 for demand in demands] for i in order_T])
    seen = seen_of(logits_TE, state_of())
    chosen_TE = np.asarray(choose(READY, seen).chosen_TE)
    for e, kept in enumerate([9, 6, 3, 9]):
        assert set(np.flatnonzero(chosen_TE[:, e])) == set(np.flatnonzero(order_T < kept))
    assert choose(READY, seen).most_rows >= chosen_TE.sum()
    state = after(READY, state_of(), measured(seen))
    assert state["held_back"] == 18 - 1.5 * k
    assert READY.shown(state) == {"cut": jnp.mean(state["cut_E"]), "held_back": 9}
    free = choose(dataclasses.replace(READY, guard=0.0), seen).chosen_TE
    np.testing.assert_array_equal(np.sum(free, axis=0), demands)


def test_the_bound_on_rows_holds_where_float32_rounds_up():
    # 45 of 1.4 / 3 are 20.999... to Python, and 21 to the device.
    router, experts, tokens = ExpertThreshold(1.4, warmup_steps=0, guard=1.0), 3, 45
    state = router.initial_state(experts) | {
        "cut_E": jnp.full(experts, -99.0),
        "updates": jnp.int32(1),
    }
    routing = router({}, seen_of(draw(tokens=tokens)[:, :experts], state))
    assert routing.load_E.tolist() == [42] * experts
    assert jnp.sum(routing.load_E) <= routing.most_rows


def test_the_first_update_sets_the_cuts_of_its_batch_exactly():
    state = after(READY, READY.initial_state(E), measure(draw(), state=READY.initial_state(E)))
    np.testing.assert_array_equal(state["cut_E"], kth(draw(), T // E))
    assert state["updates"] == 1


def test_cuts_are_the_bias_corrected_average():
    router, state = dataclasses.replace(READY, decay=0.8), READY.initial_state(E)
    raw_E = np.zeros(E)
    for step in range(1, 5):
        halves = draw(2 * step), draw(2 * step + 1)
        state = after(router, state, *(measure(z) for z in halves))
        raw_E = 0.8 * raw_E + 0.2 * np.mean([kth(z, T // E) for z in halves], axis=0)
        np.testing.assert_allclose(state["cut_E"], raw_E / (1 - 0.8**step), rtol=1e-5)
    same = after(router, state, measure(draw(), jnp.zeros(T, bool)))
    np.testing.assert_array_equal(same["cut_E"], state["cut_E"])
    assert same["updates"] == state["updates"]


def test_cuts_come_to_the_quantiles_and_loads_to_their_shares():
    tokens, mean_E = 512, jnp.array([-1.0, 0.0, 0.5, 2.0])
    router = dataclasses.replace(READY, decay=0.9)

    def step(state, key):
        seen = seen_of(mean_E + jax.random.normal(key, (tokens, E)), state)
        return after(router, state, router.measure({}, seen, router({}, seen))), None

    run = jax.jit(lambda keys: jax.lax.scan(step, router.initial_state(E), keys)[0])
    state = run(jax.random.split(jax.random.key(0), 200))
    wanted_E = np.asarray(mean_E) + NormalDist().inv_cdf(1 - 1 / E)
    np.testing.assert_allclose(state["cut_E"], wanted_E, atol=0.05)
    fresh_TE = mean_E + jax.random.normal(jax.random.key(1), (20000, E))
    chosen_TE = choose(router, seen_of(fresh_TE, state, training=False)).chosen_TE
    np.testing.assert_allclose(np.mean(chosen_TE, axis=0), 1 / E, rtol=0.1)


def test_padding_changes_no_state():
    padded_TE = jnp.concatenate([draw(), jnp.full((7, E), jnp.nan)])
    valid_T = jnp.arange(T + 7) < T
    one, other = measure(draw()), measure(padded_TE, valid_T)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_devices_measure_the_whole_batch():
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), T)

    def choose_and_measure(tokens, state):
        seen = RouterInput(None, tokens["logits_TE"], tokens["valid_T"], state, training=True)
        return jax.tree.map(lambda x: x[None], READY.measure({}, seen, READY({}, seen)))

    tokens = {"logits_TE": draw(), "valid_T": jnp.arange(T) != 3}
    alone = jax.jit(choose_and_measure)(tokens, state_of())
    with jax.set_mesh(mesh):
        tokens = jax.device_put(tokens, jax.NamedSharding(mesh, P(("slice", "data", "expert"))))
        split = jax.jit(lambda t, s: by_token(choose_and_measure, t, s, True))(tokens, state_of())
    jax.tree.map(np.testing.assert_array_equal, alone, split)


def test_cuts_of_the_batch_do_not_depend_on_how_it_is_cut():
    router = dataclasses.replace(READY, over="batch")
    logits_TE, update = draw(tokens=256), jax.jit(after, static_argnums=0)

    def first(router, *parts):
        state = READY.initial_state(E)
        return np.asarray(
            update(router, state, *(measure(z, router=router) for z in parts))["cut_E"]
        )

    parts = logits_TE[:40], logits_TE[40:]
    whole_E = first(router, logits_TE)
    np.testing.assert_array_equal(first(router, *parts), whole_E)
    np.testing.assert_allclose(whole_E, kth(logits_TE, 64), atol=0.02)
    # The mean of the parts' own cuts is another number.
    assert np.any(np.abs(first(READY, *parts) - kth(logits_TE, 64)) > 1e-3)
