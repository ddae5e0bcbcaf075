"""Null experts: independent ones (AdaMoE) and one shared null logit, against literal loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.routers import NullExperts, SharedNull
from tests.routing.descent import free_balance, used_after
from tests.routing.given import given, replace

T = 12


def seen_by(router, seed, experts, valid_T=None):
    seen = given(router, jnp.zeros((T, experts)), valid_T)
    shape = (T, experts + router.free_experts)
    return replace(seen, logits_TE=2 * jax.random.normal(jax.random.key(seed), shape))


def softmax(z):
    weights = np.exp(z - z.max())
    return weights / weights.sum()


# ── AdaMoE ───────────────────────────────────────────────────────────────────────────────────────


def test_adamoe_is_that_of_a_loop():
    router, experts = NullExperts(k=3, nulls=5), 4
    seen = seen_by(router, 0, experts, jnp.arange(T) != 3)
    # The last token has null experts alone.
    seen = replace(seen, logits_TE=seen.logits_TE.at[-1, experts:].add(20.0))
    seen, routing = jax.device_get((seen, router({}, seen)))
    for token in range(T):
        probs = softmax(np.asarray(seen.logits_TE[token], np.float64))
        chosen = sorted(range(9), key=lambda e: -probs[e])[:3]
        real = [e for e in chosen if e < experts] if token != 3 else []
        wanted = {e: probs[e] / sum(probs[r] for r in real) for e in real}
        slots = zip(routing.expert_TK[token].tolist(), routing.weight_TK[token], strict=True)
        used = {e: w for e, w in slots if e < experts}
        assert list(used) == real
        np.testing.assert_allclose(list(used.values()), list(wanted.values()), rtol=1e-5)
        nulls = int(routing.extra["choices_TJ"][token, -1])
        # Neither costs a row: rows and nulls are the k of each token.
        assert len(real) + nulls == (3 if token != 3 else 0)
    counts = np.asarray(routing.experts_per_token_T)
    assert counts.max() == 3
    assert counts[-1] == 0


def test_adamoe_loss_by_hand():
    router, experts, nulls = NullExperts(k=3, nulls=5), 4, 5
    seen = seen_by(router, 1, experts)
    f, P = np.zeros(9), np.zeros(9)
    for token in range(T):
        probs = softmax(np.asarray(seen.logits_TE[token], np.float64))
        f[np.argsort(-probs)[:3]] += 1 / T
        P += probs / T
    f[experts:] = f[experts:].mean()
    wanted = (experts + nulls) * np.sum(f * P)
    np.testing.assert_allclose(free_balance(router, seen), wanted, rtol=1e-5)


def test_adamoe_loss_tells_reals_and_not_nulls_apart():
    # Each token takes expert t % 4, and a null one: which one, the loss does not see.
    router, token_T = NullExperts(k=2, nulls=4), jnp.arange(T)

    def loss(real_T, null_T):
        columns = jnp.arange(8)
        logits = 6.0 * (columns == real_T[:, None]) + 5.0 * (columns == 4 + null_T[:, None])
        return free_balance(router, replace(seen_by(router, 0, 4), logits_TE=logits))

    even = loss(token_T % 4, token_T % 4)
    np.testing.assert_allclose(loss(token_T % 4, token_T * 0), even, rtol=1e-6)
    assert loss(token_T % 2, token_T % 4) > 1.2 * even


# ── One null logit ───────────────────────────────────────────────────────────────────────────────


def literal(router, logits_TS, with_loss=True):
    """(weights of the experts, loss) with the M columns made."""
    experts = logits_TS.shape[-1] - 1
    nulls = router.nulls(experts)
    wide_TS = jnp.concatenate(
        [logits_TS[:, :experts], jnp.repeat(logits_TS[:, -1:], nulls, axis=1)], axis=-1
    )
    probs_TS = jax.nn.softmax(wide_TS, axis=-1)
    _, best_TK = jax.lax.top_k(jax.lax.stop_gradient(wide_TS), router.k)
    chosen_TS = jnp.any(best_TK[:, :, None] == jnp.arange(experts + nulls), axis=1)
    real_TE = jnp.where(chosen_TS[:, :experts], probs_TS[:, :experts], 0.0)
    total_T1 = jnp.sum(real_TE, axis=-1, keepdims=True)
    weight_TE = real_TE / jnp.where(total_T1 > 0, total_T1, 1.0)
    share_S = jnp.mean(chosen_TS.astype(jnp.float32), axis=0)
    loss = (experts + nulls) * jnp.sum(share_S * jnp.mean(probs_TS, axis=0))
    return weight_TE, loss


@pytest.mark.parametrize("experts", [4, 16])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.67])
def test_shared_null_is_the_router_with_all_null_columns(experts, density):
    router = SharedNull(k=4, density=density)
    assert router.nulls(experts) == round(experts * (1 - density) / density)
    along_TE = jax.random.normal(jax.random.key(9), (T, experts))

    def thin(logits_TS):
        seen = replace(seen_by(router, 0, experts), logits_TE=logits_TS)
        routing = router({}, seen)
        weight_TE = jnp.zeros((T, experts + 1)).at[
            jnp.arange(T)[:, None], routing.expert_TK
        ].set(routing.weight_TK)[:, :experts]  # fmt: skip
        loss = free_balance(router, seen, routing)
        return loss + jnp.sum(weight_TE * along_TE), (weight_TE, loss, routing.load_E)

    def wide(logits_TS):
        weight_TE, loss = literal(router, logits_TS)
        return loss + jnp.sum(weight_TE * along_TE), (weight_TE, loss)

    @jax.jit
    @jax.vmap
    def both(seed):
        logits_TS = 2 * jax.random.normal(jax.random.key(seed), (T, experts + 1))
        return [jax.value_and_grad(f, has_aux=True)(logits_TS) for f in (thin, wide)]

    ((_, (weight, loss, load)), slope), ((_, (weight_0, loss_0)), slope_0) = both(jnp.arange(100))
    np.testing.assert_array_equal(weight > 0, weight_0 > 0)
    np.testing.assert_array_equal(load.sum(), (weight_0 > 0).sum())
    np.testing.assert_allclose(weight, weight_0, atol=1e-6)
    np.testing.assert_allclose(loss, loss_0, rtol=1e-5)
    np.testing.assert_allclose(slope, slope_0, atol=1e-5)


def test_the_null_logit_decides_the_number_and_weighs_nothing():
    router = SharedNull(k=3)
    seen = seen_by(router, 4, 8)
    logits_TS = np.array(seen.logits_TE)
    before = router({}, seen)
    # Anywhere between the last expert that is used and the first that is not.
    sorted_TE = -np.sort(-logits_TS[:, :-1], axis=-1)
    wide_TE = np.pad(sorted_TE, ((0, 0), (1, 1)), constant_values=((0, 0), (99, -99)))
    used_T = np.asarray(before.experts_per_token_T)
    low_T = wide_TE[np.arange(T), np.where(used_T == 3, 4, used_T + 1)]
    high_T = wide_TE[np.arange(T), used_T]
    logits_TS[:, -1] = 0.9 * np.maximum(low_T, -9) + 0.1 * np.minimum(high_T, 9)
    after = router({}, replace(seen, logits_TE=jnp.asarray(logits_TS)))
    np.testing.assert_array_equal(after.expert_TK, before.expert_TK)
    np.testing.assert_allclose(after.weight_TK, before.weight_TK, rtol=1e-5)
    assert len(set(used_T.tolist())) > 2


def test_the_balance_loss_brings_the_mean_and_not_every_token():
    used_T = np.asarray(used_after(SharedNull(k=4, density=0.5), 300))
    assert abs(used_T.mean() - 2) < 0.2
    assert used_T.std() > 0.5
    # It is the loss that does it.
    assert used_after(SharedNull(k=4, density=0.5), 300, weight=0.0).mean() > 2.5


def test_what_is_expected_is_what_balance_gives():
    assert NullExperts(k=3, nulls=8).bounds(8).expected == 1.5
    assert NullExperts(k=3, nulls=2).bounds(8).fewest == 1
    assert SharedNull(k=8, density=0.5).bounds(16).expected == 4
    assert SharedNull(k=2, density=1.0).nulls(8) == 1
