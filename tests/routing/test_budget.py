"""The budget of top-p: the quantile that holds it, over all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
