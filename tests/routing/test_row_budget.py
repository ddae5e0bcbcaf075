"""The row budget, worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import Routing, TopP
from dynmoe_jax.routing.transforms import chain, dropped
from dynmoe_jax.routing.transforms.row_budget import RowBudget


def by_hand():
    """Three tokens, three experts: 0 -> {0, 2}, 1 -> {}, 2 -> {0}."""
    probs_TE = jnp.array([[0.3, 0.1, 0.6], [0.4, 0.3, 0.3], [0.8, 0.1, 0.1]])
    return Routing(
        expert_TK=jnp.array([[0, 2], [3, 3], [0, 3]]),
        weight_TK=jnp.array([[0.3, 0.6], [0.0, 0.0], [0.8, 0.0]]),
        probs_TE=probs_TE,
        logits_TE=jnp.log(probs_TE),
        num_experts=3,
    )


def test_the_least_probable_pair_is_dropped_and_counted():
    # ceil(3 * 0.6) = 2 rows; the pair (token 0, expert 0) with probability 0.3 has to go.
    kept = RowBudget(0.6)(by_hand(), None)
    # The used slot comes first, though it was the second.
    np.testing.assert_array_equal(kept.expert_TK, [[2, 3], [3, 3], [0, 3]])
    np.testing.assert_allclose(kept.weight_TK[:, 0], [0.6, 0.0, 0.8])
    assert dropped(by_hand(), kept) == 1


@pytest.mark.parametrize("rows_per_token", [1.0, 2.0, 9.0])
def test_a_budget_that_suffices_drops_nothing(rows_per_token):
    kept = RowBudget(rows_per_token)(by_hand(), None)
    np.testing.assert_array_equal(kept.expert_TK, by_hand().expert_TK)
    assert dropped(by_hand(), kept) == 0


def test_the_bound_on_rows():
    assert RowBudget(1.5).row_bound(tokens=5, rows=35, num_experts=16) == 8  # ceil(7.5)
    assert RowBudget(9.0).row_bound(tokens=5, rows=35, num_experts=16) == 35


def test_a_chain_keeps_to_the_tightest_budget():
    both = chain((RowBudget(1.0), RowBudget(0.3)), by_hand(), None)
    np.testing.assert_array_equal(both.expert_TK, [[3, 3], [3, 3], [0, 3]])


def test_padding_takes_no_room():
    """Padding tokens have flat scores, more probable than many a choice of a real token."""
    logits_TE = jnp.array([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0], [0, 0, 0, 9.0]])
    valid_T = jnp.array([False, True, True, False])
    routing = TopP(0.9999).on_logits(logits_TE, valid_T)
    kept = RowBudget(0.5)(routing, None)
    assert routing.experts_per_token_T.tolist() == [0, 4, 4, 0]
    assert kept.experts_per_token_T.tolist() == [0, 1, 1, 0]


def test_kept_slots_have_the_gradients_of_their_gates():
    logits_TE = jax.random.normal(jax.random.key(0), (8, 4))
    routing = TopP(0.6).on_logits(logits_TE, jnp.ones(8, bool))

    def gates(weight_TK):
        given = dataclasses.replace(routing, weight_TK=weight_TK)
        kept = RowBudget(1.25)(given, None)
        return jnp.sum(jnp.where(kept.used_TK, kept.weight_TK, 0.0)), kept

    gradient_TK, kept = jax.jit(jax.grad(gates, has_aux=True))(routing.weight_TK)
    assert dropped(routing, kept) > 0
    chosen = np.asarray(kept.chosen_TE)
    of_slots = np.take_along_axis(
        np.pad(chosen, ((0, 0), (0, 1))), np.asarray(routing.expert_TK), axis=1
    )
    np.testing.assert_array_equal(gradient_TK, of_slots)
