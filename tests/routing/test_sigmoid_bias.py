"""Loss-free balancing: what the bias may change, and how it moves."""

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.routing import SigmoidBias
from tests.routing.given import E, T, given, replace

ROUTER = SigmoidBias(k=3)


def draw():
    return given(ROUTER, jax.random.normal(jax.random.key(0), (T, E)))


def with_bias(seen, bias_E):
    return ROUTER({}, replace(seen, state={"bias_E": bias_E}))


def test_a_bias_that_all_experts_share_changes_nothing():
    seen = draw()
    plain, shifted = with_bias(seen, jnp.zeros(E)), with_bias(seen, jnp.full(E, 0.25))
    np.testing.assert_array_equal(plain.expert_TK, shifted.expert_TK)
    np.testing.assert_array_equal(plain.weight_TK, shifted.weight_TK)


def test_the_bias_chooses_and_does_not_weigh():
    seen = draw()
    routing = with_bias(seen, jnp.zeros(E).at[5].set(2.0))
    assert np.all(np.any(np.asarray(routing.expert_TK) == 5, axis=-1))
    score_TE = np.asarray(jax.nn.sigmoid(seen.logits_TE))
    chosen_TK = np.take_along_axis(score_TE, np.asarray(routing.expert_TK), axis=-1)
    wanted_TK = chosen_TK / chosen_TK.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(routing.weight_TK, wanted_TK, rtol=1e-6)


def test_no_gradient_reaches_the_bias():
    seen = draw()
    gradient_E = jax.grad(lambda b: jnp.sum(with_bias(seen, b).weight_TK[:, 0] ** 2))(jnp.zeros(E))
    np.testing.assert_array_equal(gradient_E, 0)


def test_the_bias_moves_by_the_sign_of_what_is_missing():
    router = SigmoidBias(k=1, rate=0.01)
    state_N = {"bias_E": jnp.zeros((2, 4))}
    # Mean 5 in the first layer: one above, two below, one at it.
    seen_N = {"load_E": jnp.array([[9, 2, 4, 5], [5, 5, 5, 5]])}
    after, revised = router.next_state({}, state_N, seen_N)
    np.testing.assert_allclose(after["bias_E"], [[-0.01, 0.01, 0.01, 0], [0] * 4], rtol=1e-6)
    assert revised is None
