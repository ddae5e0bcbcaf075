"""Controllers: traces worked out by hand, and promises of every registered one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.registry import CONTROLLERS
from dynmoe_jax.routing.controllers import LayerCounts
from dynmoe_jax.routing.controllers.drop_rate import DropRate
from dynmoe_jax.routing.controllers.linear import Linear
from dynmoe_jax.routing.routers.relu import Sparsity

N, E = 2, 4


def counts(load_NE, dropped_N=(0, 0), expected=2.0, tokens=10.0):
    load_NE = jnp.asarray(load_NE)
    exists_NE = jnp.ones(load_NE.shape, bool)
    return LayerCounts(
        load_NE, exists_NE, jnp.asarray(dropped_N), jnp.full(N, expected), jnp.float32(tokens)
    )


EVEN = [[5] * E] * N


@pytest.mark.parametrize("name", CONTROLLERS)
def test_state_keeps_its_shape_and_the_coefficient_has_the_declared_one(name):
    controller = CONTROLLERS[name]()
    state = controller.initial(0.01, N)
    after = controller.update(state, counts(EVEN, (3, 0)))
    shape = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert shape(after) == shape(state)
    coefficient = controller.coefficient(0.01, state, jnp.int32(0))
    assert jnp.shape(coefficient) == ((N,) if controller.per_layer else ())
    np.testing.assert_allclose(coefficient, 0.01)


def test_skywork_trace_by_hand():
    controller = DropRate(gain=0.2, largest=0.01, memory=0.9)
    state, wanted_N = controller.initial(0.002, N), np.array([0.002, 0.002])
    for dropped_N in [(0, 8), (2, 40), (0, 0)]:
        # Twenty choices a layer: shares 0, 0.4; 0.1, 2 (cut at 0.01); 0, 0.
        aim_N = np.minimum(0.2 * np.array(dropped_N) / 20, 0.01)
        wanted_N = 0.9 * wanted_N + 0.1 * aim_N
        state = controller.update(state, counts(EVEN, dropped_N))
        np.testing.assert_allclose(state["coefficient_N"], wanted_N, rtol=1e-6)
    assert state["coefficient_N"][0] != state["coefficient_N"][1]


def test_linear_schedule_by_hand():
    controller = Linear(final=0.1, begin=10, end=20)
    found = [float(controller.coefficient(0.5, {}, jnp.int32(s))) for s in (0, 10, 15, 20, 99)]
    np.testing.assert_allclose(found, [0.5, 0.5, 0.3, 0.1, 0.1], rtol=1e-6)


def test_sparsity_trace_by_hand():
    controller = Sparsity(factor=1.2)
    state = controller.initial(1e-8, N)
    dense, sparse, met = [[10] * E] * N, [[1] * E] * N, EVEN  # 4, 0.4 and 2 experts a token
    trace = []
    for load_NE in (dense, dense, sparse, met):
        state = controller.update(state, counts(load_NE))
        trace.append(float(state["coefficient"]))
    # Where the target is met exactly, it divides.
    np.testing.assert_allclose(trace, [1.2e-8, 1.44e-8, 1.2e-8, 1e-8], rtol=1e-5)


def test_sparsity_does_not_count_experts_that_do_not_exist():
    load_NE = jnp.array([[10, 10, 10, 10], [4, 4, 0, 0]])
    exists_NE = jnp.array([[True] * 4, [True, True, False, False]])
    seen = LayerCounts(load_NE, exists_NE, jnp.zeros(N), jnp.array([4.0, 1.0]), jnp.float32(10))
    # 48 of 60 gates are open, of 50 that are wanted: sparse, so it divides.
    after = Sparsity(factor=2.0).update({"coefficient": jnp.float32(1)}, seen)
    np.testing.assert_allclose(after["coefficient"], 0.5)
