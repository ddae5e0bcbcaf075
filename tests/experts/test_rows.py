"""The layout of (token, expert) pairs, worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.experts import rows_from_routing
from dynmoe_jax.routing import Routing, TopP
from tests.experts.budgeted import rows_within


def by_hand():
    """Three tokens, three experts: 0 -> {2, 0}, 1 -> {}, 2 -> {0}."""
    probs_TE = jnp.array([[0.3, 0.1, 0.6], [0.4, 0.3, 0.3], [0.8, 0.1, 0.1]])
    return Routing(
        expert_TK=jnp.array([[2, 0], [3, 3], [0, 3]]),
        weight_TK=jnp.array([[0.6, 0.3], [0.0, 0.0], [0.8, 0.0]]),
        probs_TE=probs_TE,
        logits_TE=jnp.log(probs_TE),
        num_experts=3,
    )


def test_rows_are_sorted_by_expert_and_then_by_token():
    rows = rows_from_routing(by_hand())
    assert rows.group_size_E.tolist() == [2, 0, 1]
    assert rows.token_R[:3].tolist() == [0, 2, 0]
    np.testing.assert_allclose(rows.weight_R[:3], [0.3, 0.8, 0.6])
    assert rows.used_R.tolist() == [True] * 3 + [False] * 3
    assert rows.expert_R[:3].tolist() == [0, 0, 2]
    assert rows.start_E.tolist() == [0, 2, 2]
    # Token 0 stands in rows 2 (expert 2) and 0 (expert 0), token 2 in row 1; 6 means none.
    assert rows.row_TK.tolist() == [[2, 0], [6, 6], [1, 6]]
    assert rows.dropped == 0


def test_rows_within_a_budget_are_no_more_than_it():
    # ceil(3 * 0.6) = 2 rows; the pair (token 0, expert 0) with probability 0.3 has to go.
    rows = rows_within(by_hand(), 0.6)
    assert rows.token_R.shape == (2,)
    assert rows.group_size_E.tolist() == [1, 0, 1]
    assert rows.token_R.tolist() == [2, 0]
    np.testing.assert_allclose(rows.weight_R, [0.8, 0.6])
    assert rows.row_TK.tolist() == [[1, 2], [2, 2], [0, 2]]


def test_rows_of_a_budget_that_suffices():
    rows = rows_within(by_hand(), 1.0)
    assert rows.token_R.shape == (3,)
    assert rows.group_size_E.tolist() == [2, 0, 1]


@pytest.mark.parametrize("budget", [None, 1.5])
def test_every_chosen_pair_stands_once_and_carries_its_gradient(budget):
    tokens, experts = 200, 8
    logits_TE = 2 * jax.random.normal(jax.random.key(0), (tokens, experts))
    routing = TopP(0.5).on_logits(logits_TE, jnp.arange(tokens) % 5 > 0)
    rows = rows_within(routing, budget)
    used = np.asarray(rows.used_R)
    pairs = set(zip(rows.token_R[used].tolist(), rows.expert_R[used].tolist(), strict=True))
    chosen = set(map(tuple, np.argwhere(routing.chosen_TE).tolist()))
    assert len(pairs) == used.sum() == min(len(chosen), rows.token_R.size)
    assert pairs <= chosen

    # d sum(weight_R) / d weight_TK is 1 at a laid-out pair and 0 at a dropped or empty slot.
    def total(weight_TK):
        laid_out = rows_within(dataclasses.replace(routing, weight_TK=weight_TK), budget)
        return jnp.sum(jnp.where(laid_out.used_R, laid_out.weight_R, 0.0))

    assert jnp.sum(jax.grad(total)(routing.weight_TK)) == len(pairs)
