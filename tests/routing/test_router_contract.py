"""Promises that every registered router keeps."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.mesh.sharding import by_token
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import Routing
from tests.routing.given import D, E, T, given, params_of, replace

CASES = {name: kind() for name, kind in ROUTERS.items()}
CASES["top_k with a random second"] = ROUTERS["top_k"](renormalize=True, second="random")
CASES["top_k with a good second"] = ROUTERS["top_k"](k=3, softmax="after", second="threshold")
CASES["top_k behind a tanh"] = ROUTERS["top_k"](k=3, net="tanh", straight_through=True)
CASES["top_p with a budget"] = ROUTERS["top_p"](experts_per_token=1.76)
CASES["top_p with a controller"] = ROUTERS["top_p"](
    experts_per_token=1.76, budget_rule="proportional_integral", normalize_logits=True
)
CASES["threshold, cumulative"] = ROUTERS["threshold"](0.6, rule="cumulative")
CASES["threshold, fixed"] = ROUTERS["threshold"](rule="fixed", k=3)
CASES["top_p within limits"] = ROUTERS["top_p"](min_experts=2, max_experts=3)
TOKEN_CHOICE = {
    name: router
    for name, router in CASES.items()
    if isinstance(
        jax.eval_shape(lambda r=router: r(params_of(r), given(r, jnp.zeros((T, E))))), Routing
    )
}

every_router = pytest.mark.parametrize("router", TOKEN_CHOICE.values(), ids=TOKEN_CHOICE)


def draw(seed=0, tokens=T):
    # Wide, so that no two logits are near a tie.
    return 3 * jax.random.normal(jax.random.key(seed), (tokens, E))


def arrays_of(seen):
    """The arrays of tokens that a router is given, by name."""
    arrays = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
    return {name: array for name, array in arrays.items() if isinstance(array, jax.Array)}


def route(router, seen):
    return router(params_of(router), seen)


@every_router
def test_padding_gets_no_expert_whatever_it_holds(router):
    valid_T = jnp.arange(T) % 3 != 0
    poisoned_TE = jnp.where(valid_T[:, None], draw(), jnp.nan)

    def weights(logits_TE):
        routing = route(router, given(router, logits_TE, valid_T))
        return jnp.sum(jnp.where(routing.used_TK, routing.weight_TK**2, 0.0)), routing

    (_, routing), gradient = jax.value_and_grad(weights, has_aux=True)(poisoned_TE)
    assert not np.any(np.asarray(routing.used_TK)[~np.asarray(valid_T)])
    assert np.all(np.isfinite(gradient))
    (_, clean), _ = jax.value_and_grad(weights, has_aux=True)(draw())
    np.testing.assert_array_equal(routing.expert_TK, clean.expert_TK)


@every_router
def test_used_slots_come_first_and_no_expert_twice(router):
    routing = route(router, given(router, draw()))
    used_TK = np.asarray(routing.used_TK)
    assert np.all(used_TK[:, :-1] >= used_TK[:, 1:])
    assert np.all(np.asarray(routing.weight_TK)[~used_TK] == 0)
    for experts, used in zip(np.asarray(routing.expert_TK), used_TK, strict=True):
        assert len(set(experts[used])) == used.sum()


@every_router
@hypothesis.given(
    st.lists(st.floats(-30, 30, width=32), min_size=E, max_size=E), st.integers(0, 50)
)
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
def test_bounds_hold_for_any_logits(router, logits, token):
    bounds = router.bounds(E)
    seen = given(router, jnp.array([logits], jnp.float32))
    if seen.token_id_T is not None:
        seen = replace(seen, token_id_T=jnp.array([token]))
    used = int(route(router, seen).experts_per_token_T[0])
    assert bounds.fewest <= used <= bounds.slots <= E
    assert bounds.fewest <= bounds.expected <= E


@every_router
def test_a_causal_router_does_not_look_at_later_tokens(router):
    seen = given(router, draw())
    later_TE = jnp.where(jnp.arange(T)[:, None] >= T // 2, -seen.logits_TE[::-1], seen.logits_TE)
    before, after = route(router, seen), route(router, replace(seen, logits_TE=later_TE))
    same = [
        np.array_equal(np.asarray(a)[: T // 2], np.asarray(b)[: T // 2])
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    assert all(same) or not router.causal


@every_router
def test_eight_devices_choose_as_one_does(router):
    # Sequences that lie on one device each.
    seen = replace(given(router, draw(tokens=32)), length=4)
    tokens = arrays_of(seen)

    def choose(tokens, state):
        return router(params_of(router), replace(seen, state=state, **tokens))

    alone = jax.jit(choose)(tokens, seen.state)
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), 32)
    with jax.set_mesh(mesh):
        split = jax.device_put(tokens, jax.NamedSharding(mesh, P(("slice", "data", "expert"))))
        whole = router.group == "batch"
        together = jax.jit(lambda t, s: by_token(choose, t, s, whole))(split, seen.state)
    np.testing.assert_array_equal(together.expert_TK, alone.expert_TK)
    np.testing.assert_allclose(together.weight_TK, alone.weight_TK, rtol=1e-6)


@every_router
def test_what_is_measured_adds_up(router):
    if router.group == "batch":
        return  # parts of a batch choose by themselves, and may measure their own choice
    seen = replace(given(router, draw(), jnp.arange(T) != 5, training=True), length=4)
    params = params_of(router)

    def measured(part):
        cut = replace(seen, **{name: array[part] for name, array in arrays_of(seen).items()})
        return router.measure(params, cut, router(params, cut))

    whole = measured(slice(0, T))
    parts = jax.tree.map(jnp.add, measured(slice(0, T // 2)), measured(slice(T // 2, T)))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@every_router
def test_a_state_keeps_its_shape_and_a_router_without_one_measures_nothing(router):
    state = router.layer_state(D, E)
    if not state:
        seen = given(router, draw())
        assert not jax.tree.leaves(router.measure(params_of(router), seen, route(router, seen)))
        return
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)  # noqa: E731
    seen = given(router, draw(), training=True)
    measured = router.measure(params_of(router), seen, route(router, seen))
    after, _ = router.next_state(stack(params_of(router)), stack(state), stack(measured))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), stack(state)
    )


@pytest.mark.parametrize("name", ROUTERS)
def test_settings_that_cannot_be_met_are_refused_in_a_sentence(name):
    kind = ROUTERS[name]
    counts = [f.name for f in dataclasses.fields(kind) if f.metadata["unit"] == "experts"]
    for field in counts:
        refusal = kind(**{field: E + 1}).obstacle(E)
        assert refusal.startswith(f"{field}=")
        assert "num_experts=8" in refusal
