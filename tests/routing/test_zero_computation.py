"""Identity experts: what they give, and the bias that keeps the budget."""

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.routing.routers import ZeroComputation
from tests.routing.descent import free_balance
from tests.routing.given import given, replace

N, Z, K, BUDGET, T = 12, 6, 4, 2.5, 1024
ROUTER = ZeroComputation(k=K, identities=Z, experts_per_token=BUDGET, rate=0.5)


def seen_by(router, logits_TS, state=None):
    seen = given(router, jnp.zeros((len(logits_TS), N)))
    return replace(seen, logits_TE=logits_TS, state=state or seen.state)


@jax.jit
def logits_at(step):
    """Logits that change from step to step, and drift towards the experts for 100 steps."""
    noise_TS = jax.random.normal(jax.random.key(step), (T, N + Z))
    lean_S = 0.5 * jax.random.normal(jax.random.key(10**6), (N + Z,))
    drift = jnp.minimum(step, 100) / 100
    return noise_TS + lean_S + jnp.where(jnp.arange(N + Z) < N, 0.8 * drift, 0.0)


def history(rate, steps=300):
    """(mean experts, deviation) of each step; the last state."""
    router = ZeroComputation(k=K, identities=Z, experts_per_token=BUDGET, rate=rate)

    def step(state, number):
        seen = seen_by(router, logits_at(number), state)
        routing = router({}, seen)
        measured = router.measure({}, seen, routing)
        layers = jax.tree.map(lambda x: x[None], (state, measured))
        after, _ = router.next_state({}, *layers)
        used_T = routing.experts_per_token_T
        load_E = measured["load_E"]
        worst = jnp.max(load_E) / jnp.mean(load_E) - 1
        return jax.tree.map(lambda x: x[0], after), (jnp.mean(used_T), jnp.std(used_T), worst)

    return jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(steps)))(router.initial_state(N))


def test_the_bias_rule_is_the_budget():
    state, (mean, deviation, worst) = history(0.5)
    settled = np.asarray(mean)[-50:]
    assert abs(settled.mean() - BUDGET) < 0.02 * BUDGET
    assert np.asarray(deviation)[-50:].min() > 0.5
    assert np.asarray(worst)[-50:].mean() < 0.25
    assert state["bias_E"].shape == (N,)  # identity experts have none
    _, (mean, _, _) = history(0.0)
    assert abs(np.asarray(mean)[-50:].mean() - BUDGET) > 0.1 * BUDGET


def test_the_rule_by_hand():
    router = ZeroComputation(k=2, identities=2, experts_per_token=1.5, rate=0.5)
    state_N = {"bias_E": jnp.array([[0.1, 0.0, 0.0]])}
    seen_N = {"load_E": jnp.array([[6, 3, 0]]), "tokens": jnp.array([10])}
    after, _ = router.next_state({}, state_N, seen_N)
    # 1.5 / (2 * 3) = 0.25 of the 20 choices each.
    wanted = [0.1 + 0.5 * (0.25 - 0.3), 0.5 * (0.25 - 0.15), 0.5 * 0.25]
    np.testing.assert_allclose(after["bias_E"][0], wanted, rtol=1e-6)
    nothing = {"load_E": jnp.zeros((1, 3), int), "tokens": jnp.array([0])}
    after, _ = router.next_state({}, state_N, nothing)
    np.testing.assert_array_equal(after["bias_E"], state_N["bias_E"])


def test_it_is_that_of_a_loop():
    bias_E = 0.02 * jax.random.normal(jax.random.key(1), (N,))
    seen = seen_by(ROUTER, logits_at(0)[:40], {"bias_E": bias_E})
    routing = ROUTER({}, seen)
    x_TD = jax.random.normal(jax.random.key(2), (40, 3))
    free_TD = ROUTER.free_output({}, x_TD, routing)
    bias_S = np.append(bias_E, np.zeros(Z))
    seen, routing, x_TD, free_TD = jax.device_get((seen, routing, x_TD, free_TD))
    for t in range(40):
        weights = np.exp(np.asarray(seen.logits_TE[t], np.float64))
        probs = weights / weights.sum()
        chosen = sorted(range(N + Z), key=lambda e: -(probs + bias_S)[e])[:K]
        real = [e for e in chosen if e < N]
        assert routing.expert_TK[t].tolist() == real + [N] * (K - len(real))
        np.testing.assert_allclose(routing.weight_TK[t, : len(real)], probs[real], rtol=1e-5)
        identity = sum(probs[e] for e in chosen if e >= N)
        np.testing.assert_allclose(free_TD[t], identity * x_TD[t], rtol=1e-4, atol=1e-6)
    # Identity choices cost no row.
    identities = int(np.sum(routing.extra["choices_TJ"][:, -1]))
    assert int(np.sum(routing.used_TK)) + identities == 40 * K
    assert identities > 0


def test_the_loss_over_device_groups_by_hand():
    router = ZeroComputation(k=K, identities=Z, experts_per_token=BUDGET, device_groups=3)
    seen = seen_by(router, logits_at(0)[:40])
    routing = router({}, seen)
    weights = np.exp(np.asarray(seen.logits_TE, np.float64))
    P_S = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=0)
    load_E = np.asarray(routing.load_E)
    wanted = 0.0
    for group in range(3):
        inside = slice(4 * group, 4 * group + 4)
        wanted += 3 / (BUDGET * 40) * load_E[inside].sum() * P_S[inside].sum()
    wanted += (40 * K - load_E.sum()) / ((K - BUDGET) * 40) * P_S[N:].sum()
    np.testing.assert_allclose(free_balance(router, seen, routing), wanted, rtol=1e-5)


def test_a_budget_that_cannot_be_kept_is_refused():
    refusal = ZeroComputation(k=3, experts_per_token=3.0).obstacle(8)
    assert refusal.startswith("experts_per_token=3 must be at least 0 and less than k=3")
    assert ZeroComputation(k=8, identities=2, experts_per_token=5.0).obstacle(8)
    assert ZeroComputation(device_groups=3).obstacle(8).startswith("device_groups=3 must divide")
