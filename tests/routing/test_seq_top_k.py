"""Sequence-level top-k against loops over sorted pairs, and its rule of decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import SeqTopK

B, L, E = 3, 8, 4
ROUTER = SeqTopK(k=2, extra=1)


choose = jax.jit(lambda router, seen: router({}, seen), static_argnums=0)


def draw(seed=0, batch=B, length=L):
    return 2 * jax.random.normal(jax.random.key(seed), (batch * length, E))


def route(logits_TE, valid_T=None, *, training, length=L, router=ROUTER, cache=None):
    valid_T = jnp.ones(len(logits_TE), bool) if valid_T is None else valid_T
    cache = cache or {}
    seen = RouterInput(None, logits_TE, valid_T, cache=cache, length=length, training=training)
    return choose(router, seen), seen


def used(logits_TE, valid_T=None, **options):
    routing, _ = route(logits_TE, valid_T, **options)
    return np.asarray(routing.experts_per_token_T).reshape(-1, options.get("length", L))


def best_pairs(score_LE, budget, router=ROUTER):
    """Experts of each token among the best pairs, by one look at each pair."""
    length, experts = score_LE.shape
    most = min(router.k + router.extra, experts)
    by_token = [
        sorted(range(experts), key=lambda e, t=t: (-score_LE[t, e], e)) for t in range(length)
    ]
    chosen = {(t, e) for t in range(length) for e in by_token[t][: router.min_experts]}
    pairs = sorted(
        ((t, e) for t in range(length) for e in by_token[t][:most]),
        key=lambda pair: (-score_LE[pair], *pair),
    )
    for pair in pairs:
        if len(chosen) < budget:
            chosen.add(pair)
    return chosen


def online(score_LE, router=ROUTER, ledger=True):
    """Experts of each token, as somebody who writes would choose them."""
    counts, total = [], 0
    for m in range(1, len(score_LE) + 1):
        pairs = [(-score_LE[t, e], t, e) for t in range(m) for e in range(score_LE.shape[1])]
        own = sum(t == m - 1 for _, t, _ in sorted(pairs)[: m * router.k])
        most = min(router.k + router.extra, score_LE.shape[1])
        count = np.clip(
            own, router.min_experts, min(most, m * router.k - total) if ledger else most
        )
        counts.append(count)
        total += count
    return counts


def scores(logits_TE):
    return np.asarray(jax.nn.softmax(logits_TE, axis=-1)).reshape(-1, L, E)


@pytest.mark.parametrize("min_experts", [0, 1])
def test_training_takes_the_best_pairs_of_each_sequence(min_experts):
    router = SeqTopK(k=2, extra=1, min_experts=min_experts)
    # Rounded, so that there are ties.
    logits_TE = jnp.round(draw())
    routing, _ = route(logits_TE, training=True, router=router)
    chosen_BLE = np.asarray(routing.chosen_TE).reshape(B, L, E)
    for chosen_LE, score_LE in zip(chosen_BLE, scores(logits_TE), strict=True):
        wanted = best_pairs(score_LE, 2 * L, router)
        assert {(int(t), int(e)) for t, e in zip(*np.nonzero(chosen_LE), strict=True)} == wanted
    np.testing.assert_array_equal(chosen_BLE.sum((1, 2)), 2 * L)
    assert chosen_BLE.sum(-1).min() >= min_experts
    assert chosen_BLE.sum(-1).max() == 3


def test_the_rows_of_padding_are_not_spent():
    valid_T = jnp.arange(B * L) % L < jnp.repeat(jnp.array([5, 8, 0]), L)
    logits_TE = jnp.where(valid_T[:, None], draw(), jnp.nan)
    for training in (True, False):
        used_BL = used(logits_TE, valid_T, training=training)
        assert not used_BL[0, 5:].any()
        assert not used_BL[2].any()
    used_BL = used(logits_TE, valid_T, training=True)
    np.testing.assert_array_equal(used_BL.sum(1), [10, 16, 0])
    np.testing.assert_array_equal(used_BL[0, :5], used(draw()[:5], training=True, length=5)[0])


def test_weights_are_the_probabilities_or_their_share():
    logits_TE = draw()
    raw, _ = route(logits_TE, training=True)
    picked = np.take_along_axis(np.asarray(raw.probs_TE), np.asarray(raw.expert_TK) % E, axis=1)
    np.testing.assert_array_equal(raw.weight_TK, np.where(raw.used_TK, picked, 0))
    shares, _ = route(logits_TE, training=True, router=SeqTopK(k=2, extra=1, renormalize=True))
    np.testing.assert_allclose(np.sum(shares.weight_TK, axis=1), 1, rtol=1e-6)


def test_sequences_do_not_meet_and_later_tokens_take_from_earlier_ones_in_training():
    logits_TE = draw()
    other_TE = logits_TE.at[L:].set(draw(1)[L:])
    for training in (True, False):
        before, after = used(logits_TE, training=training), used(other_TE, training=training)
        np.testing.assert_array_equal(before[0], after[0])
        assert np.any(before[1:] != after[1:])
    # A last token that is sure of nothing has three good pairs, one that is sure has one.
    sure_TE = logits_TE.at[L - 1].set(jnp.array([20.0, 0, 0, 0]))
    torn_TE = logits_TE.at[L - 1].set(jnp.array([5.0, 5, 5, -20]))
    sure_BL, torn_BL = used(sure_TE, training=True), used(torn_TE, training=True)
    assert np.any(sure_BL[0, :-1] != torn_BL[0, :-1])
    np.testing.assert_array_equal(
        used(sure_TE, training=False)[0, :-1], used(torn_TE, training=False)[0, :-1]
    )


def test_inference_is_the_online_rule():
    logits_TE = jnp.round(draw(2), 1)
    used_BL = used(logits_TE, training=False)
    for used_L, score_LE in zip(used_BL, scores(logits_TE), strict=True):
        np.testing.assert_array_equal(used_L, online(score_LE))


def test_the_ledger_holds_where_every_token_is_better_than_all_before():
    length, router = 64, SeqTopK(k=2, extra=6)
    # Evener from token to token, so that its smallest scores still beat earlier ones' seconds.
    rise_L1 = jnp.linspace(3, 0, length)[:, None]
    logits_TE = -rise_L1 * jnp.array([0.0, 1, 1, 1, 1, 1, 1, 1])
    used_L = used(logits_TE, training=False, length=length, router=router)[0]
    budget_L = 2 * np.arange(1, length + 1)
    assert np.all(np.cumsum(used_L) <= budget_L)
    score_LE = np.asarray(jax.nn.softmax(logits_TE))
    without = np.cumsum(online(score_LE, router, ledger=False))
    assert without[-1] > 1.5 * budget_L[-1]


def test_a_cache_carries_what_earlier_tokens_did():
    logits_TE = draw(3)
    valid_T = jnp.arange(B * L) % L >= jnp.repeat(jnp.array([0, 2, 3]), L)  # filled up at the left
    whole_BL = used(logits_TE, valid_T, training=False)
    cache = ROUTER.initial_cache(B, L, E)
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, 8)):
        cut = logits_TE.reshape(B, L, E)[:, part], valid_T.reshape(B, L)[:, part]
        length = cut[1].shape[1]
        routing, seen = route(
            cut[0].reshape(-1, E), cut[1].reshape(-1), training=False, length=length, cache=cache
        )
        parts.append(np.asarray(routing.experts_per_token_T).reshape(B, length))
        cache = ROUTER.next_cache({}, seen, routing)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole_BL)
    np.testing.assert_array_equal(cache["used_B"], whole_BL.sum(1))
    np.testing.assert_array_equal(cache["seen_B"], [8, 6, 5])


def test_the_gradient_is_that_of_the_chosen_probabilities():
    logits_TE = draw(4)

    def weight_of_all(logits_TE, training):
        return jnp.sum(route(logits_TE, training=training)[0].weight_TK ** 2)

    for training in (True, False):
        slope_TE = jax.grad(weight_of_all)(logits_TE, training)
        chosen_TE = route(logits_TE, training=training)[0].chosen_TE
        wanted_TE = jax.grad(
            lambda z: jnp.sum(jnp.where(chosen_TE, jax.nn.softmax(z, axis=-1), 0) ** 2)  # noqa: B023
        )(logits_TE)
        np.testing.assert_allclose(slope_TE, wanted_TE, atol=1e-6)


def test_settings_that_contradict_each_other_are_refused():
    assert SeqTopK(k=1, min_experts=2).obstacle(E).startswith("min_experts=2 must be at most k=1")
    assert SeqTopK(k=4, extra=2).bounds(E).slots == E
