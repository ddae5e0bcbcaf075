"""Cluster variance by hand, its descent, and what it does to a router; squared deviation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.routing import TopK
from dynmoe_jax.routing.losses.cluster_variance import ClusterVariance
from dynmoe_jax.routing.losses.deviation import Deviation
from tests.routing.given import E, T, given

C = 4


def value(loss, logits_TE):
    router = TopK(1)
    seen = given(router, logits_TE)
    return loss.value(loss.sums(router({}, seen), seen, {}), jnp.float32(len(logits_TE)))


INTRA = ClusterVariance(clusters=C, inter=0.0)
INTER = ClusterVariance(clusters=C, intra=0.0)


@pytest.mark.parametrize("within", ["first", "all"])
def test_the_two_variances_by_hand(within):
    logits_TE = np.asarray(jax.random.normal(jax.random.key(0), (T, E)), np.float64)
    probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
    intra, inter = [], []
    for p_E in probs_TE:
        parts = np.split(p_E, C)
        own = [parts[int(np.argmax(p_E)) // (E // C)]] if within == "first" else parts
        intra.append(np.mean([np.mean((part - part.mean()) ** 2) for part in own]))
        inter.append(np.var([part.mean() for part in parts]))
    loss = ClusterVariance(clusters=C, intra=3.0, inter=2.0, within=within)
    wanted = 3 * np.mean(intra) - 2 * np.mean(inter)
    np.testing.assert_allclose(value(loss, jnp.float32(logits_TE)), wanted, rtol=1e-4)


def test_equal_probabilities_in_the_chosen_cluster_have_no_variance():
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    even_TE = logits_TE.at[:, : E // C].set(5.0)  # the chosen one; the other stays uneven
    np.testing.assert_allclose(value(INTRA, even_TE), 0.0, atol=1e-12)
    assert value(INTRA, even_TE.at[:, 0].add(0.1)) > 1e-6


@pytest.mark.parametrize("within", ["first", "all"])
def test_descent_makes_clusters_even_within_and_unlike_each_other(within):
    intra = ClusterVariance(clusters=C, inter=0.0, within=within)
    slope = jax.grad(functools.partial(value, ClusterVariance(clusters=C, within=within)))

    @jax.jit
    def descend(logits_TE):
        def step(logits_TE, _):
            now = value(intra, logits_TE), -value(INTER, logits_TE)
            return logits_TE - 2.0 * slope(logits_TE), now

        return jax.lax.scan(step, logits_TE, None, 400)[1]

    intra, inter = map(np.asarray, descend(jax.random.normal(jax.random.key(2), (T, E))))
    if within == "all":
        assert np.all(np.diff(intra) < 0)
        assert np.all(np.diff(inter) > 0)
    else:  # at a tie of two clusters a token's first one changes, and its variance jumps
        assert intra[-1] < 0.25 * intra[0]


def correlation_gap(mu, seed):
    """Mean correlation of routing probabilities within clusters less that across, after training.

    A linear router over linear experts learns a map that differs by region.
    """
    tokens, width = 256, 8
    keys = jax.random.split(jax.random.key(seed), 4)
    x_TD = jax.random.normal(keys[0], (tokens, width))
    target_T = jnp.sin(2 * x_TD[:, 0]) * x_TD[:, 1]
    params = {
        "router": 0.5 * jax.random.normal(keys[1], (width, E)),
        "expert": 0.5 * jax.random.normal(keys[2], (width, E)),
    }
    term = ClusterVariance(clusters=C)

    def loss(params):
        router = TopK(1)
        seen = given(router, x_TD @ params["router"], x_TD=x_TD)
        routing = router({}, seen)
        output_T = jnp.einsum("td,de,te->t", x_TD, params["expert"], routing.probs_TE)
        variance = term.value(term.sums(routing, seen, {}), jnp.float32(tokens))
        return jnp.mean((output_T - target_T) ** 2) + mu * variance

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(loss)(params)), None

    params = jax.lax.scan(step, params, None, 200)[0]
    probs_TE = jax.nn.softmax(x_TD @ params["router"])
    correlation_EE = jnp.corrcoef(probs_TE.T)
    cluster_E = jnp.arange(E) // (E // C)
    same_EE = cluster_E[:, None] == cluster_E
    mean = lambda where: jnp.sum(correlation_EE * where) / jnp.sum(where)  # noqa: E731
    return mean(same_EE & ~jnp.eye(E, dtype=bool)) - mean(~same_EE)


def test_training_correlates_routing_within_clusters_and_only_with_the_loss():
    gaps = jax.jit(jax.vmap(correlation_gap, (None, 0)))
    seeds = jnp.arange(6)
    with_loss, without = np.asarray(gaps(10.0, seeds)), np.asarray(gaps(0.0, seeds))
    assert with_loss.min() > 0.5
    assert abs(without.mean()) < 3 * without.std(ddof=1) / np.sqrt(len(seeds))
    assert with_loss.min() > without.max()


def test_squared_deviation_by_hand():
    logits_TE = jax.random.normal(jax.random.key(4), (T, E))
    mean_E = np.asarray(jax.nn.softmax(logits_TE)).mean(0)
    np.testing.assert_allclose(
        value(Deviation(), logits_TE), np.sum((1 / E - mean_E) ** 2), rtol=1e-4
    )
    np.testing.assert_allclose(value(Deviation(), jnp.zeros((T, E))), 0.0, atol=1e-12)


def test_clusters_that_do_not_come_out_even_are_refused():
    with pytest.raises(config.ConfigError, match=r"clusters=3 must divide .*num_experts=16"):
        config.Config(loss=config.Loss(cluster_variance={"weight": 0.1, "clusters": 3}))
