"""MoE++: free experts against a loop, gating residuals, and the balance loss with tau."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing.routers import MoEPlusPlus
from tests.routing.descent import free_balance, used_after
from tests.routing.given import D, E, T, given, params_of, replace

ROUTER = MoEPlusPlus(k=2, zeros=1, copies=2, constants=2)
X_TD = jax.random.normal(jax.random.key(5), (T, D))


def seen_by(router=ROUTER, seed=0, **changes):
    seen = given(router, jax.random.normal(jax.random.key(seed), (T, E)), x_TD=X_TD)
    shape = (T, E + router.free_experts)
    return replace(seen, logits_TE=jax.random.normal(jax.random.key(seed), shape), **changes)


def softmax(z):
    weights = np.exp(z - z.max())
    return weights / weights.sum()


@pytest.mark.parametrize("renormalize", [False, True])
def test_free_experts_are_those_of_a_loop(renormalize):
    router = MoEPlusPlus(k=2, zeros=1, copies=2, constants=2, renormalize=renormalize)
    params, seen = params_of(router), seen_by(router)
    routing = router(params, seen)
    free_TD = router.free_output(params, X_TD, routing)
    params, seen, routing = jax.device_get((params, seen, routing))
    x_TD, free_TD = np.asarray(X_TD), np.asarray(free_TD)
    f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    rows = free = 0
    for t in range(T):
        logits = f64(seen.logits_TE[t])
        logits = logits + f64(params["residual_SS"]) @ f64(seen.previous_logits_TE[t])
        probs = softmax(logits)
        chosen = sorted(range(E + 5), key=lambda e: -probs[e])[:2]
        weights = {e: probs[e] for e in chosen}
        if renormalize:
            weights[E] = 0.0
            total = sum(weights[e] for e in chosen) or 1.0
            weights = {e: w / total for e, w in weights.items()}
        added = np.zeros(D)
        for e in chosen:
            if e in (E + 1, E + 2):
                added += weights[e] * f64(x_TD[t])
            if e >= E + 3:
                c = e - E - 3
                a1, a2 = softmax(f64(x_TD[t]) @ f64(params["mix_D2C"])[:, 2 * c : 2 * c + 2])
                added += weights[e] * (a1 * f64(x_TD[t]) + a2 * f64(params["constant_CD"])[c])
        np.testing.assert_allclose(free_TD[t], added, rtol=1e-4, atol=1e-5)
        slots = zip(routing.expert_TK[t].tolist(), routing.weight_TK[t], strict=True)
        used = {e: float(w) for e, w in slots if e < E}
        assert list(used) == [e for e in chosen if e < E]
        np.testing.assert_allclose(list(used.values()), [weights[e] for e in used], rtol=1e-4)
        rows, free = rows + len(used), free + 2 - len(used)
    # Copies, constants and zeros cost no row.
    assert rows == int(np.sum(routing.used_TK))
    assert free == int(np.sum(routing.extra["choices_TJ"][:, E:])) > 0


def test_without_a_matrix_there_is_no_residual():
    params = params_of(ROUTER) | {"residual_SS": jnp.zeros((E + 5, E + 5))}
    plain = MoEPlusPlus(k=2, zeros=1, copies=2, constants=2, residual=False)
    assert "residual_SS" not in plain.parameters(D, E)
    assert plain.reads == frozenset()
    seen = seen_by()
    for a, b in zip(jax.tree.leaves(ROUTER(params, seen)),
                    jax.tree.leaves(plain(params, replace(seen, previous_logits_TE=None))),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_layers_that_add_nothing_route_like_the_first():
    params = params_of(ROUTER) | {"residual_SS": jnp.eye(E + 5)}
    seen = seen_by(previous_logits_TE=jnp.zeros((T, E + 5)))
    first = ROUTER(params, seen)
    behind = first
    for _ in range(2):
        before = behind.logits_TE
        silent = replace(seen, logits_TE=jnp.zeros((T, E + 5)), previous_logits_TE=before)
        behind = ROUTER(params, silent)
        np.testing.assert_array_equal(behind.expert_TK, first.expert_TK)
        np.testing.assert_array_equal(behind.weight_TK, first.weight_TK)
    # With a matrix that permutes, they do not.
    turned = params | {"residual_SS": jnp.roll(jnp.eye(E + 5), 1, axis=0)}
    assert not np.array_equal(ROUTER(turned, silent).expert_TK, first.expert_TK)


def test_the_loss_by_hand_and_where_it_pulls_nowhere():
    router = MoEPlusPlus(k=2, zeros=1, copies=2, constants=2, tau=0.5, residual=False)
    seen = seen_by(router)
    routing = router(params_of(router), seen)
    chosen_TS, probs_TS = (np.asarray(a) for a in (routing.extra["choices_TJ"], routing.probs_TE))
    assert np.all(chosen_TS.sum(axis=-1) == 2)
    eta_S = np.where(np.arange(E + 5) < E, 1.0, 0.5)
    wanted = np.sum(eta_S * chosen_TS.mean(axis=0) * probs_TS.mean(axis=0))
    np.testing.assert_allclose(free_balance(router, seen, routing), wanted, rtol=1e-5)

    # f_Z = f_F / tau: the slope is one number for all experts, so that logits get none.
    def loss(logits_TS):
        routing = router(params_of(router), replace(seen, logits_TE=logits_TS))
        even_TS = jnp.broadcast_to(jnp.where(jnp.arange(E + 5) < E, 1, 2), chosen_TS.shape)
        extra = routing.extra | {"choices_TJ": even_TS}
        return free_balance(router, seen, routing.__class__(
            routing.expert_TK, routing.weight_TK, routing.probs_TE, routing.logits_TE, E,
            extra=extra))  # fmt: skip

    np.testing.assert_allclose(jax.grad(loss)(seen.logits_TE), 0, atol=1e-7)


def test_a_smaller_tau_sends_more_tokens_to_free_experts():
    def free_share(tau):
        router = MoEPlusPlus(k=2, zeros=1, copies=1, constants=0, residual=False, tau=tau)
        return 1 - used_after(router, 300, weight=1.0, first=0.0).mean() / 2

    assert free_share(0.25) > free_share(1.0) + 0.1
