"""Promises of every registered router whose experts take tokens, or means of tokens.

Those of routers whose tokens take experts are in ``test_router_contract.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.mesh.sharding import by_token
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import ExpertSlots, Routing, SoftSlots
from tests.routing.given import E, T, given, params_of, replace

L = 8
"""Tokens of a sequence, of which T are three."""


def decided(router):
    seen = given(router, jnp.zeros((T, E)))
    return jax.eval_shape(lambda: router(params_of(router), seen))


CASES = {
    f"{name} by {group}": kind(group=group)
    for name, kind in ROUTERS.items()
    if not isinstance(decided(kind()), Routing)
    for group in ("sequence", "batch")
}
every_router = pytest.mark.parametrize("router", CASES.values(), ids=CASES)


def test_both_kinds_are_there():
    assert {type(decided(router)) for router in CASES.values()} == {ExpertSlots, SoftSlots}
    for router in CASES.values():
        assert router.chooses == (type(decided(router)) is not SoftSlots)


@pytest.mark.parametrize("changed", [{"transforms": "capacity"}, {"adjugate_width": 8}])
def test_what_changes_who_is_chosen_is_refused_where_nobody_is(changed):
    moe = config.MoE(router="soft", allow_non_causal=True, num_experts=4, **changed)
    with pytest.raises(config.ConfigError, match="router='soft' mixes all; leave it at"):
        config.Config(model=config.Model(moe=moe))


def draw(seed=0, tokens=T):
    return 3 * jax.random.normal(jax.random.key(seed), (tokens, E))


def seen_of(router, logits_TE, valid_T=None, **rest):
    """Inputs in which the logits are these, also of a router that makes its own."""
    seen = given(router, logits_TE, valid_T, **rest)
    return replace(seen, logits_TE=logits_TE, length=min(L, len(logits_TE)))


def as_matrices(decision, tokens):
    """(what each token gives to experts, and gets from them), [T, E, slots]."""
    if isinstance(decision, SoftSlots):
        return np.asarray(decision.dispatch_TEC), np.asarray(decision.combine_TEC)
    token_EC, weight_EC = np.asarray(decision.token_EC), np.asarray(decision.weight_EC)
    given_TEC = np.zeros((tokens + 1, *token_EC.shape))
    got_TEC = np.zeros_like(given_TEC)
    experts, places = np.indices(token_EC.shape)
    given_TEC[token_EC, experts, places] = 1
    got_TEC[token_EC, experts, places] = weight_EC
    return given_TEC[:tokens], got_TEC[:tokens]


@every_router
def test_padding_gives_and_gets_nothing_and_has_no_say(router):
    # The first sequence is full, the second half full, the third empty.
    valid_T = jnp.arange(T) < L + L // 2
    logits_TE = draw()
    poisoned_TE = jnp.where(valid_T[:, None], logits_TE, jnp.nan)

    def total(logits_TE):
        decision = router(params_of(router), seen_of(router, logits_TE, valid_T))
        if isinstance(decision, ExpertSlots):
            return jnp.sum(decision.weight_EC**2), decision
        return jnp.sum(decision.dispatch_TEC**2 + decision.combine_TEC**2), decision

    (_, decision), gradient_TE = jax.value_and_grad(total, has_aux=True)(poisoned_TE)
    kept = np.asarray(valid_T)
    for matrix_TEC in as_matrices(decision, T):
        assert np.all(np.isfinite(matrix_TEC))
        assert not np.any(matrix_TEC[~kept])
    assert np.all(np.isfinite(gradient_TE))
    assert not np.any(np.asarray(gradient_TE)[~kept])
    # Without the padding tokens of its group a token has the same experts and weights.
    count = L + L // 2 if router.group == "batch" else L // 2
    own = slice(L + L // 2 - count, L + L // 2)
    without = seen_of(router, logits_TE[own])
    without = router(params_of(router), replace(without, length=count))
    for with_TEC, without_TEC in zip(
        as_matrices(decision, T), as_matrices(without, count), strict=True
    ):
        np.testing.assert_allclose(
            with_TEC[own].sum(axis=-1), without_TEC.sum(axis=-1), rtol=1e-5, atol=1e-7
        )


@every_router
def test_experts_take_whole_tokens_and_no_more_than_there_are(router):
    given_TEC, got_TEC = as_matrices(router(params_of(router), seen_of(router, draw())), T)
    length = L if router.group == "sequence" else T
    # What a slot holds adds up to one token, of one group, and nobody is in an expert twice.
    by_group_GEC = given_TEC.reshape(-1, length, *given_TEC.shape[1:]).sum(axis=1)
    filled = by_group_GEC > 0
    np.testing.assert_allclose(by_group_GEC[filled], 1.0, rtol=1e-5)
    assert given_TEC.sum(axis=-1).max() <= given_TEC.shape[-1] * (1 + 1e-6)
    assert np.all((got_TEC > 0) <= (given_TEC > 0))
    assert np.all(got_TEC.sum(axis=(1, 2)) <= E)


@every_router
def test_nobody_sees_another_group(router):
    if router.group != "sequence":
        return
    logits_TE = draw()
    other_TE = logits_TE.at[L:].set(-logits_TE[L:])
    params = params_of(router)
    one, two = (
        as_matrices(router(params, seen_of(router, x_TE)), T) for x_TE in (logits_TE, other_TE)
    )
    for a_TEC, b_TEC in zip(one, two, strict=True):
        np.testing.assert_array_equal(a_TEC[:L], b_TEC[:L])
        assert not np.array_equal(a_TEC[L:], b_TEC[L:])


@every_router
def test_it_looks_at_later_tokens_and_says_so(router):
    assert not router.causal
    logits_TE = draw()
    later_TE = logits_TE.at[L - 1].set(20.0 * (jnp.arange(E) < E // 2))
    params = params_of(router)
    one, two = (
        as_matrices(router(params, seen_of(router, x_TE)), T)[0] for x_TE in (logits_TE, later_TE)
    )
    assert not np.allclose(one[: L - 1], two[: L - 1])


@every_router
def test_eight_devices_decide_as_one_does(router):
    seen = seen_of(router, draw(tokens=8 * L), training=True)
    names = [n for n in ("logits_TE", "valid_T", "x_TD", "key_T") if getattr(seen, n) is not None]
    tokens = {name: getattr(seen, name) for name in names}

    def decide(tokens, params):
        decision = router(params, replace(seen, **tokens))
        return decision.by_token() if isinstance(decision, ExpertSlots) else decision

    alone = jax.jit(decide)(tokens, params_of(router))
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), 8)
    with jax.set_mesh(mesh):
        split = jax.device_put(tokens, jax.NamedSharding(mesh, P(("slice", "data", "expert"))))
        whole = router.group == "batch"
        together = jax.jit(lambda t, s: by_token(decide, t, s, whole))(split, params_of(router))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
