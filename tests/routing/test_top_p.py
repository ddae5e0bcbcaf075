"""Top-P against brute force over prefix sets, and its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dynmoe_jax.routing import RouterInput, TopP, top_p_slots

T, E = 16, 8
THRESHOLDS = [0.05, 0.2, 0.4, 0.5, 0.63, 0.8, 0.95, 0.99]
ALL = jnp.ones(T, bool)
# One row at a time may have all its mass on one expert, equal experts, or anything between.
LOGITS = hnp.arrays(np.float32, (T, E), elements=st.floats(-8, 8, width=32))
COARSE = hnp.arrays(np.float32, (T, E), elements=st.sampled_from([0.0, 0.5, 3.0]))


@functools.cache
def jitted(threshold, renormalize=False):
    return jax.jit(TopP(threshold, renormalize).on_logits)


def chosen_sets(routing):
    """The experts of every token, as sets; checks that empty slots come last and none repeats."""
    sets = []
    for row in np.asarray(routing.expert_TK):
        used = row[row < routing.num_experts]
        assert np.all(row[len(used) :] == routing.num_experts)
        assert len(set(used)) == len(used)
        sets.append(set(used.tolist()))
    return sets


def prefix_set(prob_E, threshold):
    """The smallest set of most probable experts that holds more than the threshold, by search.

    Ties go to the lower id.  All sums run in float32, as the routers' do.
    """
    order = sorted(range(len(prob_E)), key=lambda e: (-prob_E[e], e))
    for size in range(1, len(order) + 1):
        if np.cumsum(prob_E[order[:size]], dtype=np.float32)[-1] > np.float32(threshold):
            return set(order[:size])
    return set(order)


def clear_of_rounding(prob_TE, threshold):
    """Rows in which no prefix comes so close to the threshold that rounding decides."""
    mass_TE = np.cumsum(-np.sort(-prob_TE.astype(np.float64), axis=-1), axis=-1)
    return np.all(np.abs(mass_TE - threshold) > 1e-6, axis=-1)


@settings(max_examples=30, deadline=None)
@given(logits_TE=LOGITS | COARSE, threshold=st.sampled_from(THRESHOLDS))
def test_chooses_the_smallest_prefix_beyond_p(logits_TE, threshold):
    routing = jitted(threshold)(logits_TE, ALL)
    prob_TE = np.asarray(routing.probs_TE)
    clear_T = clear_of_rounding(prob_TE, threshold)
    for prob_E, chosen, clear in zip(prob_TE, chosen_sets(routing), clear_T, strict=True):
        if clear:
            assert chosen == prefix_set(prob_E, threshold)
            mass = prob_E[list(chosen)].sum(dtype=np.float64)
            assert mass > threshold
            assert mass - prob_E[list(chosen)].min() <= threshold
        assert 1 <= len(chosen) <= routing.slots


@settings(max_examples=20, deadline=None)
@given(logits_TE=LOGITS | COARSE, threshold=st.sampled_from(THRESHOLDS))
def test_weights_are_the_raw_probabilities_or_sum_to_one(logits_TE, threshold):
    raw = jitted(threshold)(logits_TE, ALL)
    scaled = jitted(threshold, renormalize=True)(logits_TE, ALL)
    prob_TK = np.take_along_axis(
        np.pad(raw.probs_TE, ((0, 0), (0, 1))), np.asarray(raw.expert_TK), axis=-1
    )
    np.testing.assert_array_equal(raw.weight_TK, prob_TK)
    np.testing.assert_array_equal(scaled.expert_TK, raw.expert_TK)
    np.testing.assert_allclose(np.sum(scaled.weight_TK, -1), 1.0, rtol=1e-6)
    total_T1 = np.sum(raw.weight_TK, axis=-1, keepdims=True)
    np.testing.assert_allclose(scaled.weight_TK, raw.weight_TK / total_T1, rtol=1e-6)


def test_random_probability_rows_at_many_thresholds():
    # Sixteen experts, rows from flat to sharp.
    rng = np.random.default_rng(0)
    logits_TE = (rng.normal(size=(1000, 16)) * rng.uniform(0, 4, (1000, 1))).astype(np.float32)
    for threshold in (0.05, 0.25, 0.4, 0.7, 0.99):
        routing = jax.jit(TopP(threshold).on_logits)(logits_TE, np.ones(1000, bool))
        prob_TE = np.asarray(routing.probs_TE)
        clear_T = clear_of_rounding(prob_TE, threshold)
        assert clear_T.mean() > 0.99
        sets = chosen_sets(routing)
        for t in np.flatnonzero(clear_T):
            assert sets[t] == prefix_set(prob_TE[t], threshold)


@pytest.mark.parametrize(
    ("experts", "threshold", "count"),
    [
        # Uniform: each expert holds 1/E, and floor(p E) + 1 of them hold more than p.
        (16, 0.4, 7),
        (16, 0.5, 9),  # 8/16 = 0.5 is not yet > 0.5: the released code's strict comparison
        (8, 0.5, 5),
        (25, 0.08, 3),  # in float32, two of 25 even probabilities sum up to p, not to more
        (25, 0.32, 9),
        (8, 0.05, 1),
        (8, 0.99, 8),
        (8, 1.0, 8),
        (1, 0.4, 1),
    ],
)
def test_uniform_rows_reach_the_bound(experts, threshold, count):
    router = TopP(threshold)
    routing = jax.jit(router.on_logits)(np.zeros((3, experts)), np.ones(3, bool))
    assert router.bounds(experts).slots == top_p_slots(experts, threshold) == count
    assert routing.expert_TK.shape == (3, count)
    np.testing.assert_array_equal(routing.experts_per_token_T, count)
    np.testing.assert_array_equal(routing.expert_TK[0], np.arange(count))


@settings(max_examples=200, deadline=None)
@given(experts=st.integers(1, 256), threshold=st.floats(0.01, 1.0))
def test_the_bound_is_provable_and_tight(experts, threshold):
    # The m most probable experts hold at least m/E, so a token never needs more than the smallest
    # m with m/E > p; a uniform row needs them all.
    slots, threshold = top_p_slots(experts, threshold), float(np.float32(threshold))
    assert slots == experts or slots / experts > threshold
    assert (slots - 1) / experts <= threshold + 2**-20


@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.99])
def test_one_hot_rows_take_one_expert(threshold):
    routing = jitted(threshold)(100.0 * jax.nn.one_hot(jnp.arange(T) % E, E), ALL)
    assert chosen_sets(routing) == [{t % E} for t in range(T)]
    np.testing.assert_array_equal(routing.experts_per_token_T, 1)


def test_ties_go_to_the_lower_id():
    # Experts 1, 3, 5 and 7 hold a quarter each; two of them pass p = 0.4, and it is the first two.
    logits_TE = jnp.where(jnp.arange(E) % 2 == 1, 0.0, -100.0) + jnp.zeros((T, 1))
    routing = jitted(0.4)(logits_TE, ALL)
    assert chosen_sets(routing) == [{1, 3}] * T


def test_the_expert_that_crosses_is_included():
    # Cumulative 0.5, 0.8, 0.95: p = 0.6 is passed by the second, p = 0.4 by the first.
    logits_TE = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    assert chosen_sets(jax.jit(TopP(0.6).on_logits)(logits_TE, ALL[:1])) == [{0, 1}]
    assert chosen_sets(jax.jit(TopP(0.4).on_logits)(logits_TE, ALL[:1])) == [{0}]
    assert chosen_sets(jax.jit(TopP(0.9).on_logits)(logits_TE, ALL[:1])) == [{0, 1, 2}]


def test_padding_gets_nothing_and_changes_nothing():
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    valid_T = jnp.arange(T) % 3 > 0
    poisoned_TE = jnp.where(valid_T[:, None], logits_TE, jnp.nan)
    routing = jitted(0.63)(poisoned_TE, valid_T)
    alone = jitted(0.63)(logits_TE, ALL)
    assert np.all(routing.expert_TK[~valid_T] == E)
    assert np.all(routing.weight_TK[~valid_T] == 0)
    assert np.all(routing.experts_per_token_T[~valid_T] == 0)
    np.testing.assert_array_equal(routing.expert_TK[valid_T], alone.expert_TK[valid_T])
    np.testing.assert_array_equal(routing.weight_TK[valid_T], alone.weight_TK[valid_T])


@pytest.mark.parametrize("renormalize", [False, True])
def test_gradient_flows_through_the_weights_alone(renormalize):
    logits_TE = jax.random.normal(jax.random.key(1), (T, E))
    mix_TK = jax.random.normal(jax.random.key(2), (T, top_p_slots(E, 0.63)))
    router = TopP(0.63, renormalize)
    decided = jax.jit(router.on_logits)(logits_TE, ALL)
    expert_TK = jnp.minimum(decided.expert_TK, E - 1)

    def through_router(logits_TE):
        return jnp.sum(mix_TK * router.on_logits(logits_TE, ALL).weight_TK)

    def by_hand(logits_TE):
        """The chosen set is a constant; its members' softmax probabilities are the weights."""
        weight_TE = jnp.where(decided.chosen_TE, jax.nn.softmax(logits_TE), 0.0)
        if renormalize:
            weight_TE /= jnp.sum(weight_TE, axis=-1, keepdims=True)
        weight_TK = jnp.take_along_axis(weight_TE, expert_TK, axis=-1)
        return jnp.sum(mix_TK * jnp.where(decided.used_TK, weight_TK, 0.0))

    actual = jax.jit(jax.grad(through_router))(logits_TE)
    wanted = jax.jit(jax.grad(by_hand))(logits_TE)
    assert np.any(np.asarray(wanted) != 0)
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-7)


def test_gradients_of_empty_rows_are_zero_and_finite():
    def total(logits_TE):
        routing = TopP(0.4, renormalize=True).on_logits(logits_TE, jnp.zeros(T, bool))
        return jnp.sum(routing.weight_TK)

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.ones((T, E))), 0.0)


def test_half_precision_logits_are_routed_in_float32():
    logits_TE = jax.random.normal(jax.random.key(0), (T, E)).astype(jnp.bfloat16)
    half = jitted(0.4)(logits_TE, ALL)
    full = jitted(0.4)(logits_TE.astype(jnp.float32), ALL)
    assert half.probs_TE.dtype == half.logits_TE.dtype == half.weight_TK.dtype == jnp.float32
    np.testing.assert_array_equal(half.expert_TK, full.expert_TK)
    np.testing.assert_array_equal(half.weight_TK, full.weight_TK)


def test_fewest_and_most_experts_of_a_token():
    logits_TE = jax.random.normal(jax.random.key(0), (T, E)) * jnp.linspace(0.1, 6, T)[:, None]
    free, held = TopP(0.6), TopP(0.6, min_experts=2, max_experts=3)
    alone, within = free.on_logits(logits_TE, ALL), held.on_logits(logits_TE, ALL)
    used_T = np.asarray(alone.experts_per_token_T)
    assert used_T.min() == 1
    assert used_T.max() > 3
    np.testing.assert_array_equal(within.experts_per_token_T, np.clip(used_T, 2, 3))
    np.testing.assert_array_equal(within.expert_TK[:, :2], np.argsort(-logits_TE, axis=-1)[:, :2])
    assert (held.bounds(E).slots, held.bounds(E).fewest) == (3, 2)


def test_normalized_logits_route_alike_whatever_the_scale_of_the_router():
    router = TopP(0.5, normalize_logits=True)
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    params = {"logit_scale": jnp.float32(2.0)}

    def route(logits_TE):
        return router(params, RouterInput(None, logits_TE, ALL))

    one, other = route(logits_TE), route(7.0 * logits_TE - 3.0)
    np.testing.assert_array_equal(one.expert_TK, other.expert_TK)
    np.testing.assert_allclose(one.probs_TE, other.probs_TE, atol=1e-5)
    wanted_TE = (logits_TE - logits_TE.mean(-1, keepdims=True)) / logits_TE.std(-1, keepdims=True)
    np.testing.assert_allclose(one.probs_TE, jax.nn.softmax(2 * wanted_TE), atol=1e-5)
    slope = jax.grad(lambda p: jnp.sum(router(p, RouterInput(None, logits_TE, ALL)).weight_TK))
    assert abs(float(slope(params)["logit_scale"])) > 1e-3
    declared = TopP(normalize_logits=True, logit_scale=3.0).parameters(4, E)["logit_scale"]
    assert declared.shape == ()
    assert declared.init(jax.random.key(0), ()) == 3.0


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"min_experts": 3, "max_experts": 2}, "min_experts=3 must be at most max_experts=2"),
        (
            {"min_experts": 2, "experts_per_token": 1.5},
            "experts_per_token=1.5 must be 0, or min_experts=2 to config.model.moe.num_experts=8",
        ),
        (
            {"max_experts": 2, "experts_per_token": 2.5},
            "experts_per_token=2.5 must be 0, or 1 to max_experts=2",
        ),
        (
            {"max_threshold": 0.5, "experts_per_token": 6.0},
            "experts_per_token=6 must be at most 5, as many of config.model.moe.num_experts=8 as "
            "max_threshold=0.5 allows",
        ),
    ],
)
def test_limits_that_contradict_each_other_are_refused(settings, refusal):
    assert TopP(**settings).obstacle(E) == refusal


@pytest.mark.parametrize(
    "settings",
    [{"threshold": 0.01}, {"max_experts": 1}, {"experts_per_token": 3.0, "max_experts": 3}],
)
def test_no_mean_is_above_the_bound(settings):
    bounds = TopP(**settings).bounds(16)
    assert max(bounds.expected, bounds.usual_rows) <= bounds.slots
