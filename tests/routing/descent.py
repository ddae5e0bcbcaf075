"""A router that learns by its balance loss alone: a linear one, of features, by plain descent."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from dynmoe_jax.registry import LOSSES
from dynmoe_jax.routing import Router
from tests.routing.given import given, replace

TOKENS, EXPERTS, WIDTH = 256, 8, 8


@partial(jax.jit, static_argnums=(0, 1))
def used_after(router: Router, steps: int, weight: float = 0.1, first: float = 1.0):
    """Experts of each token after some steps of descent.

    Args:
      router: its ``free_balance`` loss is what descends.
      steps: of descent, each on features of its own.
      weight: of the loss.
      first: what the logits of experts begin with, above those of free ones.
    """
    scores = EXPERTS + router.free_experts
    params_DS = 0.3 * jax.random.normal(jax.random.key(0), (WIDTH, scores))
    # The first feature is always 1: logits may move together.
    params_DS = params_DS.at[0].set(jnp.where(jnp.arange(scores) < EXPERTS, first, 0.0))

    def routed(params_DS, seed):
        x_TD = jax.random.normal(jax.random.key(seed), (TOKENS, WIDTH)).at[:, 0].set(1)
        seen = given(router, jnp.zeros((TOKENS, EXPERTS)), x_TD=x_TD)
        seen = replace(seen, logits_TE=x_TD @ params_DS)
        return seen, router({}, seen)

    def loss(params_DS, seed):
        seen, routing = routed(params_DS, seed)
        kind = LOSSES["free_balance"]()
        return weight * kind.value(kind.sums(routing, seen, {}), TOKENS)

    def step(params_DS, seed):
        return params_DS - 0.5 * jax.grad(loss)(params_DS, seed), None

    params_DS, _ = jax.lax.scan(step, params_DS, jnp.arange(steps))
    return routed(params_DS, steps)[1].experts_per_token_T


def free_balance(router: Router, seen, routing=None):
    """The loss of what a router is given."""
    kind = LOSSES["free_balance"]()
    routing = router({}, seen) if routing is None else routing
    return kind.value(kind.sums(routing, seen, {}), jnp.sum(seen.valid_T))


def moved(routing, from_, to):
    """The routing with all choices of one group in another one."""
    choices_TJ = routing.extra["choices_TJ"]
    more_TJ = jnp.zeros_like(choices_TJ).at[:, to].set(choices_TJ[:, from_])
    choices_TJ = choices_TJ.at[:, from_].set(0) + more_TJ
    return dataclasses.replace(routing, extra=routing.extra | {"choices_TJ": choices_TJ})
