"""The budget of top-p: rules that hold it, over all layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.budget_rules import TARGET, jump, miss, settled, simulate
from dynmoe_jax.routing import TopP
from dynmoe_jax.routing.quantiles import histogram, quantile
from tests.routing.given import given, replace

T, E, N = 512, 16, 3


def layers(seed=0):
    """Logits of layers that are unlike: flat, and ever sharper."""
    drawn_NTE = jax.random.normal(jax.random.key(seed), (N, T, E))
    return drawn_NTE * jnp.array([0.3, 1.0, 3.0])[:, None, None]


def after_one_batch(router, logits_NTE):
    """(mean experts of each layer with the new threshold, the threshold)."""
    seen = [given(router, logits_TE, training=True) for logits_TE in logits_NTE]
    measured = [router.measure({}, s, router({}, s)) for s in seen]
    seen_N = jax.tree.map(lambda *x: jnp.stack(x), *measured)
    params_N = {"router_DE": jnp.zeros((N, 4, E))}
    state_N, _ = router.next_state(params_N, {"threshold": jnp.full(N, 0.4)}, seen_N)
    means = []
    for i, s in enumerate(seen):
        routing = router({}, replace(s, state={"threshold": state_N["threshold"][i]}))
        means.append(float(jnp.mean(routing.experts_per_token_T)))
    return np.array(means), np.asarray(state_N["threshold"])


@pytest.mark.parametrize("budget", [1.0, 1.3, 1.76, 2.5, 4.0, 6.0])
def test_the_next_threshold_would_have_held_the_budget(budget):
    router = TopP(experts_per_token=budget, max_threshold=1.0)
    means, threshold_N = after_one_batch(router, layers())
    # A bin of 1,000 holds that many of the N T (E - 1) masses.
    assert abs(means.mean() - budget) < 0.05
    assert np.all(threshold_N == threshold_N[0])


def test_layers_differ_while_all_of_them_hold_the_budget():
    means, _ = after_one_batch(TopP(experts_per_token=2.5, max_threshold=1.0), layers())
    assert means[0] - means[2] > 0.2


def test_the_threshold_stays_within_its_bound():
    router = TopP(experts_per_token=12.0, max_threshold=0.5)
    _, threshold_N = after_one_batch(router, layers())
    assert np.all(threshold_N == np.float32(0.5))
    assert router.bounds(E).slots == 9  # floor(0.5 * 16) + 1


def test_without_a_budget_there_is_no_state():
    assert TopP().initial_state(E) == {}


def test_a_batch_of_padding_leaves_the_threshold():
    router = TopP(experts_per_token=2.0)
    none_B = {"mass_B": histogram(jnp.ones((3, 4)), jnp.zeros(3, bool))[None]}
    state_N = {"threshold": jnp.array([0.3])}
    after, _ = router.next_state({"router_DE": jnp.zeros((1, 4, E))}, state_N, none_B)
    np.testing.assert_array_equal(after["threshold"], state_N["threshold"])


def test_quantiles_of_bins_are_those_of_the_numbers():
    values = np.random.default_rng(0).uniform(size=(4000, 3)).astype(np.float32)
    count_B = histogram(jnp.asarray(values), jnp.ones(4000, bool))
    for share in (0.01, 0.3, 0.5, 0.99):
        np.testing.assert_allclose(quantile(count_B, share), np.quantile(values, share), atol=2e-3)


def test_more_masses_than_32_bits_count_are_counted():
    # 24 layers of 1.4 million tokens and 64 experts have two billion.
    np.testing.assert_allclose(quantile(jnp.full(1000, 3e6), 0.5), 0.5, atol=1e-3)


CONTROLLED = TopP(
    experts_per_token=12.0, budget_rule="proportional_integral", max_threshold=0.7, threshold=0.4
)


def test_the_controller_follows_a_hand_computation():
    """A plant of 1 + 6 p experts; 12 cannot be met with p <= 0.7, and 1.76 can."""
    p, total, wanted = 0.4, 0.0, []
    for step in range(50):
        target = 12.0 if step < 20 else 1.76
        error = (target - (1 + 6 * p)) / 16
        raw = 0.4 + 0.5 * error + 0.5 * (total + error)
        if not (raw > 0.7 and error > 0) and not (raw < 0 and error < 0):
            total += error
        p = min(max(raw, 0.0), 0.7)
        wanted.append((p, total))
    state_N = jax.tree.map(lambda x: x[None], CONTROLLED.initial_state(16))
    params_N, seen = {"router_DE": jnp.zeros((1, 4, 16))}, []
    for step in range(50):
        router = dataclasses.replace(CONTROLLED, experts_per_token=12.0 if step < 20 else 1.76)
        used = (1 + 6 * state_N["threshold"]) * 1e6
        sums_N = {"used": used, "tokens": jnp.full(1, 10**6)}
        state_N, _ = router.next_state(params_N, state_N, sums_N)
        seen.append((float(state_N["threshold"][0]), float(state_N["integral"][0])))
    np.testing.assert_allclose(seen, wanted, atol=1e-6)
    # The bound is met, and held without adding up what cannot be corrected.
    assert seen[15][0] == seen[19][0] == np.float32(0.7)
    assert seen[15][1] == seen[19][1]
    assert abs(1 + 6 * seen[49][0] - 1.76) < 0.03


RULED = {
    "quantile": TopP(experts_per_token=TARGET, max_threshold=0.9),
    "proportional_integral": TopP(
        experts_per_token=TARGET,
        max_threshold=0.9,
        budget_rule="proportional_integral",
        normalize_logits=True,
    ),
}


@pytest.mark.parametrize("rule", RULED)
def test_a_budget_is_held_through_a_jump_of_the_logits_and_after_it_is_changed(rule):
    router = RULED[rule]
    other = dataclasses.replace(router, experts_per_token=2.5)
    assert other.bounds(16).slots == router.bounds(16).slots == 15
    means_SN, p_S = simulate(jump(360), router, other, 280, tokens=128)
    assert miss(means_SN, 100, 200) < 0.03
    assert miss(means_SN, 260, 280) < 0.03
    assert settled(means_SN, 281, 2.5) <= 40
    # Layers differ while all of them together hold it.
    assert np.ptp(np.mean(means_SN[180:200], axis=0)) > 0.2
    assert np.all(p_S <= np.float32(0.9))


def test_without_a_budget_a_jump_of_the_logits_moves_the_mean():
    fixed = TopP(threshold=0.27, normalize_logits=True)
    means_SN, _ = simulate(jump(60, 20), fixed, fixed, 0, tokens=128)
    assert miss(means_SN, 0, 20) < 0.1
    assert miss(means_SN, 20) > 0.3


@pytest.mark.parametrize("target", np.linspace(1, 6, 20))
def test_the_quantile_is_exact_to_one_choice(target):
    router = TopP(experts_per_token=float(target), max_threshold=1.0)
    logits_TE = jax.random.normal(jax.random.key(3), (16, 16))
    means, _ = after_one_batch(router, logits_TE[None])
    assert abs(means[0] - target) <= 1 / 16 + 1e-6


@pytest.mark.parametrize("rule", RULED)
def test_parts_padding_and_devices_make_no_difference(rule):
    router, logits_TE = RULED[rule], layers()[1]
    seen = given(router, jnp.where(jnp.arange(T)[:, None] < 400, logits_TE, jnp.nan),
                 jnp.arange(T) < 400, training=True)  # fmt: skip

    def state_after(*parts):
        sums = [router.measure({}, part, router({}, part)) for part in parts]
        seen_N = jax.tree.map(lambda *x: sum(x)[None], *sums)
        state_N = jax.tree.map(lambda x: x[None], router.initial_state(E))
        return router.next_state({"router_DE": jnp.zeros((1, 4, E))}, state_N, seen_N)[0]

    def part(rows):
        return replace(seen, logits_TE=seen.logits_TE[rows], valid_T=seen.valid_T[rows], x_TD=None)

    whole = state_after(seen)
    assert whole["threshold"] != router.threshold
    for others in ([part(slice(0, 400))], [part(slice(i, None, 2)) for i in range(2)]):
        for name, value in state_after(*others).items():
            np.testing.assert_array_equal(value, whole[name])


def test_a_budget_within_limits_counts_what_may_change():
    router = TopP(experts_per_token=2.4, min_experts=2, max_experts=4, max_threshold=1.0)
    means, _ = after_one_batch(router, layers())
    assert abs(means.mean() - 2.4) < 0.05
