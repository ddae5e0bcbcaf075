"""What a Routing says about itself, and what is logged of it, counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import Routing
from dynmoe_jax.routing.statistics import (
    count_histogram,
    load_imbalance,
    unused_experts,
)

# Four tokens, four experts, three slots; 4 is an empty slot.  The last token is padding.
EXPERT_TK = jnp.array([[0, 1, 2], [1, 4, 4], [1, 0, 4], [4, 4, 4]])
VALID_T = jnp.array([True, True, True, False])
ROUTING = Routing(
    EXPERT_TK, jnp.where(EXPERT_TK < 4, 0.25, 0.0), jnp.full((4, 4), 0.25), jnp.zeros((4, 4)), 4
)
# The same over two layers, the second of which leaves every token alone.
STACKED = Routing(
    jnp.stack([EXPERT_TK, jnp.full_like(EXPERT_TK, 4)]),
    jnp.stack([ROUTING.weight_TK, jnp.zeros((4, 3))]),
    jnp.stack([ROUTING.probs_TE] * 2),
    jnp.stack([ROUTING.logits_TE] * 2),
    num_experts=4,
)


def test_counts_of_a_routing():
    assert (ROUTING.num_experts, ROUTING.slots) == (4, 3)
    np.testing.assert_array_equal(ROUTING.experts_per_token_T, [3, 1, 2, 0])
    np.testing.assert_array_equal(ROUTING.load_E, [2, 3, 1, 0])
    np.testing.assert_array_equal(
        ROUTING.chosen_TE, [[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    )


def test_counts_of_a_stack():
    np.testing.assert_array_equal(STACKED.experts_per_token_T, [[3, 1, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(STACKED.load_E, [[2, 3, 1, 0], [0, 0, 0, 0]])


def test_load_imbalance():
    # Busiest 3, mean (2 + 3 + 1 + 0) / 4 = 1.5; total collapse over E gives E; nothing gives 0.
    np.testing.assert_allclose(load_imbalance(STACKED.load_E), [2.0, 0.0])
    assert load_imbalance(jnp.array([7, 7, 7])) == 1.0
    assert load_imbalance(jnp.array([9, 0, 0])) == pytest.approx(3.0)


def test_figures_of_the_host_wait_for_no_device():
    """As operations of JAX they would be done when the step is that was dispatched before them."""
    load_NE = np.array([[7, 0], [0, 0]])
    assert not isinstance(load_imbalance(load_NE), jax.Array)
    assert not isinstance(unused_experts(load_NE), jax.Array)


def test_unused_experts_of_all_layers():
    # Expert 3 of the first layer, all four of the second.
    assert unused_experts(ROUTING.load_E) == 1
    assert unused_experts(STACKED.load_E) == 5


def test_histogram_of_counts():
    # 0, 1, 2, 3 experts: one token each of 1, 2, 3; the padding token's 0 is not counted.
    np.testing.assert_array_equal(count_histogram(ROUTING, VALID_T), [0, 1, 1, 1])
    np.testing.assert_array_equal(count_histogram(STACKED, VALID_T), [[0, 1, 1, 1], [3, 0, 0, 0]])
