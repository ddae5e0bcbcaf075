"""Imitation of an oracle: labels by hand, and a router that learns them.

Axis legend: T tokens, E experts, D model width, F hidden width of an expert.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing.losses.imitation import labels
from dynmoe_jax.routing.routers.top_k import TopK
from tests.routing.given import given, replace

T, E, D, F, K = 64, 6, 8, 3, 2
ROUTER = TopK(k=K, straight_through=True)


def experts(zero=None):
    """(function of an expert and tokens, the same by numpy): slices of a ReLU feed-forward."""
    random = np.random.default_rng(0)
    up_EDF = random.standard_normal((E, D, F)).astype(np.float32)
    down_EFD = random.standard_normal((E, F, D)).astype(np.float32)
    if zero is not None:
        up_EDF, down_EFD = np.abs(up_EDF), np.abs(down_EFD)
        down_EFD[zero] = 0.0
    arrays = jnp.asarray(up_EDF), jnp.asarray(down_EFD)

    def output(e, x_TD):
        return jax.nn.relu(x_TD @ arrays[0][e]) @ arrays[1][e]

    def by_hand(x_TD):
        return np.maximum(x_TD @ up_EDF, 0) @ down_EFD

    return output, by_hand


def seen_of(x_TD, output):
    seen = given(ROUTER, jnp.zeros((len(x_TD), E)), x_TD=x_TD)
    return replace(seen, output=lambda e: output(e, x_TD))


def test_labels_are_the_nearest_experts_by_brute_force():
    output, by_hand = experts()
    x_TD = np.random.default_rng(1).standard_normal((T, D)).astype(np.float32)
    outputs_ETD = by_hand(x_TD)
    apart_ET = np.square(outputs_ETD - outputs_ETD.sum(axis=0) * K / E).sum(axis=2)
    nearest = np.argsort(apart_ET.T, axis=1)[:, :K]
    found = np.asarray(labels(seen_of(jnp.asarray(x_TD), output), E))
    assert [np.flatnonzero(row).tolist() for row in found] == np.sort(nearest).tolist()


def test_an_expert_that_gives_nothing_is_never_chosen():
    output, _ = experts(zero=4)
    x_TD = jnp.abs(jax.random.normal(jax.random.key(2), (T, D)))
    assert not labels(seen_of(x_TD, output), E)[:, 4].any()


def test_imitation_raises_agreement_with_the_oracle_above_balance_alone():
    output, _ = experts()

    def routed(router_DE, seed):
        x_TD = jax.random.normal(jax.random.key(seed), (256, D))
        seen = replace(seen_of(x_TD, output), logits_TE=x_TD @ router_DE)
        return seen, ROUTER({}, seen)

    def trained(weights):
        def loss(router_DE, seed):
            seen, routing = routed(router_DE, seed)
            kinds = {name: LOSSES[name]() for name in weights}
            values = {n: k.value(k.sums(routing, seen, {}), 256.0) for n, k in kinds.items()}
            return sum(weights[name] * jnp.sum(value) for name, value in values.items())

        def step(router_DE, seed):
            return router_DE - jax.grad(loss)(router_DE, seed), None

        first_DE = 0.02 * jax.random.normal(jax.random.key(0), (D, E))
        return jax.jit(lambda: jax.lax.scan(step, first_DE, jnp.arange(200))[0])()

    def agreement(router_DE):
        seen, routing = routed(router_DE, 1000)
        return float(jnp.mean(routing.chosen_TE & labels(seen, E)) * E / K)

    control = agreement(trained({"balance": 0.01}))
    assert agreement(trained({"balance": 0.01, "imitation": 1.0})) > control + 0.1
