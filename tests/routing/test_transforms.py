"""Transforms: promises of every registered one, and capacity against a plain loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.registry import TRANSFORMS
from dynmoe_jax.routing import Routing, TopK, TopP
from dynmoe_jax.routing.transforms import dropped
from dynmoe_jax.routing.transforms.capacity import Capacity
from dynmoe_jax.routing.transforms.row_budget import RowBudget
from tests.routing.given import given

T, E = 40, 6

every_transform = pytest.mark.parametrize("transform", [k() for k in TRANSFORMS.values()],
                                          ids=TRANSFORMS)  # fmt: skip


def routed(seed=0, router=None, tokens=T):
    router = router or TopP(0.7)
    logits_TE = 2 * jax.random.normal(jax.random.key(seed), (tokens, E)) + jnp.linspace(0, 2, E)
    return router.on_logits(logits_TE, jnp.arange(tokens) % 7 != 3)


def behind(transform, routing):
    return transform(routing, given(TopP(), routing.logits_TE))


def pairs(routing):
    """Weight of every used (token, expert) pair."""
    found = {}
    for token, row in enumerate(np.asarray(routing.expert_TK)):
        for slot, expert in enumerate(row):
            if expert < routing.num_experts:
                assert (token, expert) not in found
                found[token, int(expert)] = float(routing.weight_TK[token, slot])
    return found


@every_transform
def test_what_is_left_is_a_part_of_what_was_there_and_stands_first(transform):
    before = routed()
    after = behind(transform, before)
    assert pairs(after).items() <= pairs(before).items()
    used_TK = np.asarray(after.used_TK)
    assert np.all(used_TK[:, :-1] >= used_TK[:, 1:])
    assert int(dropped(before, after)) == len(pairs(before)) - len(pairs(after))


@every_transform
def test_row_bound_holds(transform):
    before = routed(router=TopK(4))
    bound = transform.row_bound(T, before.expert_TK.size, E)
    assert len(pairs(behind(transform, before))) <= bound < before.expert_TK.size


@every_transform
def test_a_causal_transform_does_not_look_at_later_tokens(transform):
    first, second = routed(0, TopK(3)), routed(1, TopK(3))
    half = jnp.arange(T)[:, None] < T // 2
    mixed = jax.tree.map(lambda a, b: jnp.where(half, a, b), first, second)
    kept = [
        {pair for pair in pairs(behind(transform, routing)) if pair[0] < T // 2}
        for routing in (first, mixed)
    ]
    assert kept[0] == kept[1] or not transform.causal


def test_row_budget_keeps_the_most_probable():
    before = routed()
    after = behind(RowBudget(0.5), before)
    probability = {(t, e): float(before.probs_TE[t, e]) for t, e in pairs(before)}
    most = sorted(probability, key=probability.get, reverse=True)[: math.ceil(0.5 * T)]
    assert set(pairs(after)) == set(most)


def by_loop(routing, places, by_choice):
    """Pairs that find a place, one after another in plain Python."""
    expert_TK, taken, kept = np.asarray(routing.expert_TK), [0] * E, set()
    tokens, slots = expert_TK.shape
    order = (
        [(t, k) for k in range(slots) for t in range(tokens)]
        if by_choice
        else [(t, k) for t in range(tokens) for k in range(slots)]
    )
    for token, slot in order:
        expert = int(expert_TK[token, slot])
        if expert < E and taken[expert] < places:
            taken[expert] += 1
            kept.add((token, expert))
    return kept


@pytest.mark.parametrize("priority", ["choice", "token"])
def test_capacity_is_that_of_a_loop(priority):
    transform = jax.jit(lambda r, f: Capacity(f, 1, priority)(r, None), static_argnums=1)
    for seed in range(50):
        before = routed(seed, TopK(2))
        for factor in (0.5, 1.0, 2.0):
            places = Capacity(factor, 1, priority).places(T, E)
            assert places == min(T, math.ceil(factor * T / E))
            wanted = by_loop(before, places, priority == "choice")
            assert set(pairs(transform(before, factor))) == wanted


def test_first_choices_displace_second_choices_of_earlier_tokens():
    # Three tokens have expert 0 second, then three first; it has three places.
    expert_TK = jnp.array([[1, 0], [2, 0], [3, 0], [0, 1], [0, 2], [0, 3]])
    even = jnp.full((6, E), 1 / E)
    before = Routing(expert_TK, jnp.full((6, 2), 0.5), even, jnp.zeros((6, E)), E)
    after = Capacity(factor=3.0, minimum=1, priority="choice")(before, None)
    assert {t for t, e in pairs(after) if e == 0} == {3, 4, 5}
    assert all(weight == 0.5 for weight in pairs(after).values())
    after = Capacity(factor=3.0, minimum=1, priority="token")(before, None)
    assert {t for t, e in pairs(after) if e == 0} == {0, 1, 2}
