"""Inputs of routers for tests."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.routing import Router, RouterInput

T, E, D = 24, 8, 4


def given(
    router: Router,
    logits_TE,
    valid_T=None,
    *,
    training=False,
    params=None,
    x_TD=None,
    length=0,
    reads=frozenset(),
):
    """The input that a layer would make of logits, for any router (and a loss that reads more)."""
    tokens, experts = logits_TE.shape
    valid_T = jnp.ones(tokens, bool) if valid_T is None else valid_T
    logits_TE = with_free(router, logits_TE)
    facts = {
        "key_T": "noise",
        "previous_logits_TE": "previous_logits",
        "segment_id_T": "segments",
        "token_id_T": "token_ids",
    }
    # Made only where they are read: drawing keys alone takes as long as many a router.
    arrays = {
        "key_T": lambda: jax.vmap(lambda i: jax.random.key_data(jax.random.key(i)))(
            jnp.arange(tokens)
        ),
        "previous_logits_TE": lambda: jax.random.normal(jax.random.key(2), logits_TE.shape),
        "segment_id_T": lambda: valid_T.astype(jnp.int32),
        "token_id_T": lambda: jnp.arange(tokens) * 7 + 3,
    }
    reads = router.reads | reads
    read = {name: arrays[name]() for name, fact in facts.items() if fact in reads}
    x_TD = jax.random.normal(jax.random.key(1), (tokens, D)) if x_TD is None else x_TD
    if router.logits is not None:
        params = params_of(router, experts, x_TD.shape[1]) if params is None else params
        logits_TE = router.logits(params, x_TD, experts)
    return RouterInput(
        x_TD,
        logits_TE,
        valid_T,
        router.layer_state(x_TD.shape[1], experts),
        expected=router.bounds(experts).expected,
        length=length or tokens,
        training=training,
        **read,
    )


def with_free(router: Router, logits_TE):
    """Logits with columns for the experts of a router that cost no row, made of the others."""
    columns = jnp.arange(router.free_experts)
    more_TZ = 0.7 * logits_TE[:, (columns + 1) % logits_TE.shape[-1]] + 0.1 * columns
    return jnp.concatenate([logits_TE, more_TZ], axis=-1)


def params_of(router: Router, experts=E, width=D):
    """Parameters of a router, drawn."""
    drawn = {}
    for i, (name, parameter) in enumerate(router.parameters(width, experts).items()):
        drawn[name] = 0.5 * jax.random.normal(jax.random.key(i), parameter.shape)
    return drawn


def replace(seen: RouterInput, **changes) -> RouterInput:
    """The input with other arrays."""
    return dataclasses.replace(seen, **changes)
