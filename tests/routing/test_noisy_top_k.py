"""Noisy top-k gating: the smooth load by Monte Carlo, importance by hand, and gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dynmoe_jax.routing.routers.noisy_top_k import (
    NOISE_FLOOR,
    Importance,
    Load,
    NoisyTopK,
    chance_of_choice,
    squared_variation,
)
from tests.routing.given import D, E, T, given, params_of, replace

RNG = np.random.default_rng(0)
K = 2


def seen_and_params(router, tokens=T):
    """The input of a layer in training, with drawn weights."""
    params = params_of(router)
    x_TD = jax.random.normal(jax.random.key(3), (tokens, D))
    logits_TE = x_TD @ params["router_DE"]
    return given(router, logits_TE, training=True, x_TD=x_TD), params


def test_load_is_the_frequency_with_which_an_expert_is_chosen_if_its_noise_is_redrawn():
    clean_E, sigma_E = RNG.normal(size=E), RNG.uniform(0.3, 1.5, E)
    noisy_E = clean_E + sigma_E * RNG.normal(size=E)
    chance_E = np.asarray(
        chance_of_choice(*(jnp.array([x], jnp.float32) for x in (clean_E, noisy_E, sigma_E)), K)
    )[0]
    chosen = set(np.argsort(-noisy_E)[:K])
    draws, seen_both = 20_000, set()
    for e in range(E):
        # Everybody else's noise stays, that of e is drawn anew.
        others = np.sort(np.delete(noisy_E, e))[::-1]
        redrawn = clean_E[e] + sigma_E[e] * RNG.normal(size=draws)
        frequency = np.mean(np.sum(others > redrawn[:, None], axis=1) < K)
        error = np.sqrt(max(chance_E[e] * (1 - chance_E[e]), 1 / draws) / draws)
        assert abs(frequency - chance_E[e]) < 3 * error
        seen_both.add(e in chosen)
    assert seen_both == {True, False}
    assert np.ptp(chance_E) > 0.3


def test_load_of_a_layer_is_the_formula_of_the_paper():
    router = NoisyTopK(K)
    seen, params = seen_and_params(router)
    routing = router(params, seen)
    clean_TE, noisy_TE = np.asarray(seen.logits_TE), np.asarray(routing.logits_TE)
    sigma_TE = np.log1p(np.exp(np.asarray(seen.x_TD @ params["noise_DE"]))) + NOISE_FLOOR
    wanted_TE = np.zeros((T, E))
    for t in range(T):
        order = np.argsort(-noisy_TE[t])
        for e in range(E):
            threshold = noisy_TE[t, order[K]] if e in order[:K] else noisy_TE[t, order[K - 1]]
            wanted_TE[t, e] = stats.norm.cdf((clean_TE[t, e] - threshold) / sigma_TE[t, e])
    np.testing.assert_allclose(routing.extra["load_TE"], wanted_TE, atol=1e-5)
    load_E = wanted_TE.sum(0)
    value = Load().value(Load().sums(routing, seen, params), jnp.float32(T))
    np.testing.assert_allclose(value, load_E.var() / load_E.mean() ** 2, rtol=1e-4)
    # The noise is that of the formula: its sample has the deviation that was asked for.
    scaled = (noisy_TE - clean_TE) / sigma_TE
    assert abs(scaled.std() - 1) < 4 / np.sqrt(2 * T * E)


def test_with_all_experts_chosen_the_load_is_one():
    seen, params = seen_and_params(NoisyTopK(E))
    np.testing.assert_array_equal(NoisyTopK(E)(params, seen).extra["load_TE"], 1.0)


def test_gates_are_k_and_sum_to_one_and_noise_is_of_training_alone():
    router = NoisyTopK(K)
    seen, params = seen_and_params(router)
    routing = router(params, seen)
    assert np.all(routing.experts_per_token_T == K)
    np.testing.assert_allclose(routing.weight_TK.sum(-1), 1.0, rtol=1e-6)
    chosen_TK = jnp.take_along_axis(routing.logits_TE, routing.expert_TK, axis=-1)
    np.testing.assert_allclose(routing.weight_TK, jax.nn.softmax(chosen_TK), rtol=1e-6)
    assert not np.allclose(routing.logits_TE, seen.logits_TE)
    quiet = router({}, replace(seen, training=False, key_T=None))
    np.testing.assert_array_equal(quiet.logits_TE, seen.logits_TE)
    assert not quiet.extra


@pytest.mark.parametrize("m", [1, 2, E])
def test_importance_of_m_busy_experts_is_e_over_m_less_one(m):
    router = NoisyTopK(1)
    # Token t goes to expert t mod m, alone.
    logits_TE = 50.0 * jax.nn.one_hot(jnp.arange(T) % m, E)
    seen = given(router, logits_TE)
    routing = router({}, seen)
    value = Importance().value(Importance().sums(routing, seen, {}), jnp.float32(T))
    np.testing.assert_allclose(value, E / m - 1, rtol=1e-5, atol=1e-6)


def test_importance_sums_gates_and_not_choices():
    seen, params = seen_and_params(NoisyTopK(K))
    routing = NoisyTopK(K)(params, seen)
    gates_TE = np.zeros((T, E))
    for t in range(T):
        gates_TE[t, np.asarray(routing.expert_TK[t])] = routing.weight_TK[t]
    importance_E = gates_TE.sum(0)
    value = Importance().value(Importance().sums(routing, seen, params), jnp.float32(T))
    np.testing.assert_allclose(value, importance_E.var() / importance_E.mean() ** 2, rtol=1e-4)
    np.testing.assert_allclose(squared_variation(jnp.array([1.0, 3.0])), 0.25, rtol=1e-6)


def test_weights_start_at_zero_and_noise_spreads_the_tokens_evenly():
    router, tokens = NoisyTopK(K), 2048
    declared = router.parameters(D, E)
    assert {p.init for p in declared.values()} == {"zeros"}
    assert declared.keys() == {"router_DE", "noise_DE"}
    params = {name: jnp.zeros(p.shape) for name, p in declared.items()}
    routing = router(params, given(router, jnp.zeros((tokens, E)), training=True))
    load_E = np.asarray(routing.load_E)
    # Two experts of a token exclude each other, which only lowers the statistic.
    assert stats.chisquare(load_E).pvalue > 0.01
    assert np.ptp(np.asarray(routing.extra["load_TE"]).mean(0)) < 0.05


def test_both_losses_have_the_gradients_of_finite_differences():
    router = NoisyTopK(K)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(v, jnp.float64) for name, v in params_of(router).items()}
        x_TD = jax.random.normal(jax.random.key(3), (T, D), jnp.float64)
        drawn_TE = jax.random.normal(jax.random.key(4), (T, E), jnp.float64)

        def loss(params):
            clean_TE = x_TD @ params["router_DE"]
            sigma_TE = jax.nn.softplus(x_TD @ params["noise_DE"]) + NOISE_FLOOR
            noisy_TE = clean_TE + drawn_TE * sigma_TE
            return squared_variation(chance_of_choice(clean_TE, noisy_TE, sigma_TE, K).sum(0))

        gradient = jax.grad(loss)(params)
        for name in params:
            along = jax.random.normal(jax.random.key(9), params[name].shape, jnp.float64)
            ends = [loss(params | {name: params[name] + s * 1e-6 * along}) for s in (1, -1)]
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(jnp.sum(gradient[name] * along), slope, rtol=1e-5)
            assert abs(slope) > 1e-4
