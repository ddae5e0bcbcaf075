"""ReMoE: continuity, and the loss in terms of the load-balancing loss."""

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.routing import TopK
from dynmoe_jax.routing.controllers import LayerCounts
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.routers import ReLU
from dynmoe_jax.routing.routers.relu import L1, Sparsity
from tests.routing.given import E, T, given

EPSILON = 1e-4


def output(router, logits_E, values_E):
    """A token's sum of weighed expert outputs."""
    routing = router.on_logits(logits_E[None], jnp.ones(1, bool))
    padded = jnp.append(values_E, 0.0)
    return float(jnp.sum(routing.weight_TK[0] * padded[routing.expert_TK[0]]))


def test_output_is_continuous_where_an_expert_comes_in():
    values_E = jnp.linspace(1, 3, E)

    def jump(router, base):
        ends = [output(router, jnp.full(E, base).at[0].add(s * EPSILON), values_E) for s in (1, -1)]
        return abs(ends[0] - ends[1])

    assert jump(ReLU(), 0.0) < 10 * EPSILON  # as a logit crosses zero
    assert jump(TopK(1), 1.0) > 0.01  # as two logits cross: another expert at once


def test_l1_is_the_balance_loss_of_gates_over_k():
    router = ReLU(experts_per_token=3.0)
    seen = given(router, jax.random.normal(jax.random.key(0), (T, E)))
    routing = router({}, seen)
    tokens = jnp.float32(T)
    l1, balance = L1(), Balance()
    wanted = balance.value(balance.sums(routing, seen, {}), tokens) / 3
    np.testing.assert_allclose(l1.value(l1.sums(routing, seen, {}), tokens), wanted, rtol=1e-6)


def test_even_load_gives_the_mean_of_the_gates_over_k():
    router = ReLU(experts_per_token=2.0)
    logits_TE = jnp.where(jnp.arange(E) % 2 == jnp.arange(T)[:, None] % 2, 0.7, -1.0)
    seen = given(router, logits_TE)
    sums = L1().sums(router({}, seen), seen, {})
    # Every expert is used by half of the tokens: 8 * (1/2 * 0.35) over 8 experts, over k = 2.
    np.testing.assert_allclose(L1().value(sums, jnp.float32(T)), 8 * 8 * 0.5 * 0.35 / 2, rtol=1e-6)


def test_more_choices_than_32_bits_count_are_counted():
    layers, experts, tokens = 64, 16, 2**22
    load_NE = jnp.full((layers, experts), tokens // 2, jnp.int32)  # 8 of 16 experts, for 4 wanted
    exists_NE, nothing_N = jnp.ones(load_NE.shape, bool), jnp.zeros(layers, jnp.int32)
    counts = LayerCounts(load_NE, exists_NE, nothing_N, jnp.full(layers, 4.0), jnp.float32(tokens))
    state = Sparsity(factor=2.0).update({"coefficient": jnp.float32(1.0)}, counts)
    assert state["coefficient"] == 2.0
