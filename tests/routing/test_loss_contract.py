"""Promises that every registered routing loss keeps, and what each is by hand elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.registry import LOSSES, ROUTERS
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.router import OUTPUTS
from tests.routing.given import D, E, T, given, params_of, replace

LENGTH = 6
"""Tokens of a sequence; a batch is cut between sequences alone."""

OF_EXPERTS = {"gate_up_ED2F": 0.5 * jax.random.normal(jax.random.key(9), (E, 4, 6))}
"""Parameters of experts that losses may need."""

every_loss = pytest.mark.parametrize("name", LOSSES)


def router_for(name):
    """A router that chooses and gives what the loss needs, of each token's logits alone if any."""
    needs = LOSSES[name].needs
    fitting = [
        router
        for router in (kind() for kind in ROUTERS.values())
        if needs <= router.gives | params_of(router).keys() | OF_EXPERTS.keys() | {OUTPUTS}
    ]

    def shortcomings(router):
        return router.group != "token", len(router.reads), router.bounds(E).fewest == E

    return min(fitting, key=shortcomings)


def draw(seed=0):
    return jax.random.normal(jax.random.key(seed), (T, E))


def parts_of(name, logits_TE, valid_T, length=LENGTH):
    router, reads = router_for(name), LOSSES[name].reads
    # Parts of a batch see what the whole does: the same tokens but for their logits, and no noise.
    alike_TD = jnp.ones((len(logits_TE), D))
    seen: RouterInput = given(
        router, logits_TE, valid_T, training=True, x_TD=alike_TD, length=length, reads=reads
    )
    if OUTPUTS in LOSSES[name].needs:
        seen = replace(seen, output=lambda e: jnp.full((len(logits_TE), D), 1.0 + e))
    if "noise" in router.reads:
        seen = replace(seen, key_T=None)
    params = params_of(router)
    return LOSSES[name]().sums(router(params, seen), seen, params | OF_EXPERTS)


def value_of(name, logits_TE, valid_T, length=LENGTH):
    tokens = jnp.maximum(jnp.sum(valid_T), 1)
    return LOSSES[name]().value(parts_of(name, logits_TE, valid_T, length), tokens)


@every_loss
def test_a_router_gives_what_the_loss_needs(name):
    assert router_for(name) is not None


@every_loss
def test_sums_add_up_over_parts_of_a_batch(name):
    logits_TE, valid_T = draw(), jnp.arange(T) % 4 != 1
    whole = parts_of(name, logits_TE, valid_T)
    parts = zip(jnp.split(logits_TE, 2), jnp.split(valid_T, 2), strict=True)
    halves = [parts_of(name, *part) for part in parts]
    together = jax.tree.map(jnp.add, *halves)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@every_loss
def test_additive_as_declared(name):
    # Halves that choose other experts: a loss that is not linear in its sums must show it.
    lean_TE = draw() + 4 * jnp.where(jnp.arange(T) < T // 2, 1, -1)[:, None] * jnp.linspace(
        -1, 1, E
    )
    all_T = jnp.ones(T // 2, bool)
    halves = [value_of(name, half, all_T) for half in jnp.split(lean_TE, 2)]
    whole = value_of(name, lean_TE, jnp.ones(T, bool))
    linear = np.allclose(np.mean(halves), whole, rtol=1e-4)
    assert linear == bool(LOSSES[name]().additive)


@every_loss
def test_padding_counts_nowhere(name):
    # At the end of every sequence, so that without it neighbors stay neighbors.
    valid_T = jnp.arange(T) % LENGTH < LENGTH - 2
    logits_TE = draw()
    poisoned_TE = jnp.where(valid_T[:, None], logits_TE, jnp.nan)
    value, gradient = jax.value_and_grad(lambda z: value_of(name, z, valid_T))(poisoned_TE)
    all_T = jnp.ones(int(valid_T.sum()), bool)
    kept = value_of(name, logits_TE[valid_T], all_T, LENGTH - 2)
    np.testing.assert_allclose(value, kept, rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[~np.asarray(valid_T)] == 0)


@every_loss
def test_without_a_valid_token_the_loss_is_zero(name):
    assert value_of(name, draw(), jnp.zeros(T, bool)) == 0


@every_loss
def test_gradient_is_the_slope(name):
    logits_TE, valid_T = draw(), jnp.ones(T, bool)
    along_TE = draw(1)
    slope = jnp.sum(jax.grad(lambda z: value_of(name, z, valid_T))(logits_TE) * along_TE)
    step = 1e-3
    ends = [value_of(name, logits_TE + sign * step * along_TE, valid_T) for sign in (1, -1)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=0.02, atol=2e-4)


@every_loss
def test_layers_in_front_are_left_alone(name):
    one = parts_of(name, draw(0), jnp.ones(T, bool))
    two = parts_of(name, draw(1), jnp.ones(T, bool))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), one, two)
    loss = LOSSES[name]()
    np.testing.assert_allclose(
        loss.value(stacked, jnp.float32(T)),
        [loss.value(sums, jnp.float32(T)) for sums in (one, two)],
        rtol=1e-5,
    )
