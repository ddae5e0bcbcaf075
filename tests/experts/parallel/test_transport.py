"""Tokens that travel: slots, queues and exchanges by hand, transports against one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.experts import ExpertWeights, apply_experts
from dynmoe_jax.experts.parallel.choice import choose_transport, device_visits
from dynmoe_jax.experts.parallel.exchange import Exchanged, all_to_all, capacity_per_pair
from dynmoe_jax.experts.parallel.transport import ring
from dynmoe_jax.experts.permute import take
from dynmoe_jax.experts.reference import reference_experts
from dynmoe_jax.experts.rows import Slots
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.mesh.axes import EXPERT
from dynmoe_jax.mesh.make_mesh import make_mesh
from dynmoe_jax.mesh.sharding import by_token
from dynmoe_jax.routing import TopP
from dynmoe_jax.routing.transforms import dropped
from dynmoe_jax.routing.transforms.row_budget import RowBudget

T, D, E, F = 32, 8, 8, 4
ALL = jnp.ones(T, bool)
TPU = Target("tpu", "TPU v5")


def ragged_by_hand(x_nCX, sent_n, received_n):
    """What ``ragged_all_to_all`` does, on a CPU: only slots that are used arrive."""
    came_nCX = all_to_all(x_nCX, sent_n, received_n)
    used_nC = jnp.arange(x_nCX.shape[1]) < received_n[:, None]
    return jnp.where(used_nC[..., None], came_nCX, 0)


TRANSPORTS = {
    "ring": ring,
    "all_to_all": Exchanged(all_to_all),
    "ragged": Exchanged(ragged_by_hand),
}


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    x_TD, logits_TE = jax.random.normal(keys[0], (T, D)), jax.random.normal(keys[1], (T, E))
    # Expert 3 is nobody's choice; the last eight tokens, all of one device, are padding.
    logits_TE = logits_TE.at[:, 3].set(-50.0)
    weights = ExpertWeights(
        jax.random.normal(keys[2], (E, D, 2 * F)), jax.random.normal(keys[3], (E, F, D))
    )
    return x_TD, logits_TE, weights


def value_and_gradients(case, transport=None):
    def loss(x_TD, logits_TE, weights):
        routing = TopP(0.6).on_logits(logits_TE, jnp.arange(T) < T - 8)
        y_TD, dropped = apply_experts(
            x_TD, routing, weights, reference_experts, transport=transport
        )
        return jnp.sum(jnp.sin(y_TD)), (y_TD, dropped)

    (_, (y_TD, dropped)), gradients = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    )(*case)
    return (y_TD, gradients), dropped


@pytest.fixture(scope="module")
def wanted(case):
    return value_and_gradients(case)[0]


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_transports_equal_one_device(name, devices, case, wanted):
    mesh = make_mesh(config.Mesh(data=1, expert=devices), 8, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        actual, dropped = value_and_gradients(case, TRANSPORTS[name])
    assert dropped == 0
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, w = np.asarray(a), np.asarray(w)
        assert np.linalg.norm(a - w) <= 1e-5 * np.linalg.norm(w)


def test_a_bound_drops_the_last_tokens_and_counts_their_rows():
    # Two devices with two tokens each, one slot from each to the other.  All four tokens choose
    # experts 0 and 1, which both lie on the first device: the second token of each loses both.
    x_TD = jnp.ones((4, D)) * jnp.arange(1, 5)[:, None]
    routing = TopP(0.6).on_logits(
        jnp.tile(jnp.array([2.0, 2.0, -9.0, -9.0]), (4, 1)), jnp.ones(4, bool)
    )
    weights = ExpertWeights(jnp.ones((4, D, 2 * F)), jnp.ones((4, F, D)))
    whole_TD, _ = apply_experts(x_TD, routing, weights, reference_experts)
    mesh = make_mesh(config.Mesh(data=1, expert=2), 2, jax.devices()[:2])
    with jax.set_mesh(mesh):
        y_TD, dropped = jax.jit(
            partial(apply_experts, backend=reference_experts, transport=Exchanged(all_to_all, 0.5))
        )(x_TD, routing, weights)
    assert dropped == 4
    np.testing.assert_allclose(y_TD[::2], whole_TD[::2], rtol=1e-6)
    np.testing.assert_array_equal(y_TD[1::2], 0)


def test_a_row_budget_holds_on_every_device(case):
    x_TD, logits_TE, weights = case
    budget, per_device = RowBudget(2.0), 2 * T // 4
    routing = TopP(0.6).on_logits(0.1 * logits_TE, jnp.ones(T, bool))
    chosen_TE = routing.chosen_TE.reshape(4, T // 4, E)
    over = np.maximum(np.asarray(chosen_TE.sum(axis=(1, 2))) - per_device, 0).sum()

    @jax.jit
    def layer(x_TD, routing, weights):
        kept = by_token(lambda routing, _: budget(routing, None), routing)
        bound = lambda tokens, slots: budget.row_bound(tokens, slots, E)  # noqa: E731
        y_TD, more = apply_experts(x_TD, kept, weights, reference_experts, bound, ring)
        return y_TD, kept, more

    with jax.set_mesh(make_mesh(config.Mesh(data=1, expert=4), 4, jax.devices()[:4])):
        y_TD, kept, more = jax.device_get(layer(x_TD, routing, weights))
    assert dropped(routing, kept) == over > 0
    assert more == 0
    assert kept.experts_per_token_T.reshape(4, -1).sum(axis=1).max() <= per_device
    kept = jax.tree.map(jnp.asarray, kept)
    wanted_TD, _ = apply_experts(x_TD, kept, weights, reference_experts)
    np.testing.assert_allclose(y_TD, wanted_TD, rtol=1e-4, atol=1e-5)


def test_slots_among_some_experts_by_hand():
    slots = Slots(jnp.array([[5, 2, 3, 8], [8, 8, 8, 8], [7, 0, 8, 8]]), jnp.ones((3, 4)), 8)
    # Experts 2 and 3; "no expert" is now 2.
    mine = slots.among(2, 2)
    np.testing.assert_array_equal(mine.expert_TK, [[0, 1], [2, 2], [2, 2]])
    np.testing.assert_array_equal(mine.weight_TK, [[1, 1], [0, 0], [0, 0]])
    # The last four: a phantom 8 - 4 = 4 must not become one of the experts 0 to 3.
    np.testing.assert_array_equal(
        slots.among(4, 4).expert_TK, [[1, 4, 4, 4], [4, 4, 4, 4], [3, 4, 4, 4]]
    )
    # Nor an id below zero the last of them, which indexing from the end would make of it.
    assert np.asarray(slots.among(6, 2).expert_TK).max() == 2


def test_take_and_its_gradient_by_hand():
    # Slots 0 and 1 hold tokens 2 and 0, slot 2 none; token 1 has no slot.
    x_TD = jnp.array([[1.0], [2.0], [3.0]])
    token_C, slot_T = jnp.array([2, 0, 3]), jnp.array([1, 3, 0])
    y_CD, pull_back = jax.vjp(lambda x: take(x, token_C, slot_T), x_TD)
    np.testing.assert_array_equal(y_CD, [[3.0], [1.0], [0.0]])
    (dx_TD,) = pull_back(jnp.array([[10.0], [20.0], [30.0]]))
    np.testing.assert_array_equal(dx_TD, [[20.0], [0.0], [10.0]])


def test_capacity_per_pair_by_hand():
    assert capacity_per_pair(100, 0.0) == 100
    assert capacity_per_pair(100, 0.301) == 31
    assert capacity_per_pair(100, 1.0) == 100


def test_visits_by_hand():
    # Of 4 devices 3 are others; each is met with probability 1 - (3/4)^2 = 7/16.
    assert device_visits(2, 4) == pytest.approx(21 / 16)


@pytest.mark.parametrize(
    ("settings", "target", "devices", "wanted"),
    [
        ({}, Target("cpu"), 8, "ring"),
        ({}, TPU, 2, "ring"),  # 70% of the ring's bytes
        ({}, TPU, 8, "ragged_all_to_all"),  # 21%
        ({"router": "top_k", "top_k": {"k": 8}}, TPU, 8, "ring"),  # 66%
        ({"tokens_per_pair": 0.5}, Target("cpu"), 4, "all_to_all"),
        ({"transport": "ring"}, TPU, 8, "ring"),
    ],
)
def test_the_rule(settings, target, devices, wanted):
    assert choose_transport(config.MoE(**settings), target, devices) == wanted


def test_ragged_exchange_is_refused_on_a_cpu():
    with pytest.raises(config.ConfigError, match=r"transport='ragged_all_to_all' needs a GPU"):
        choose_transport(config.MoE(transport="ragged_all_to_all"), Target("cpu"), 4)


def test_ring_sends_what_it_promises(case):
    """Forward: three all-gathers and a reduce-scatter; backward mirrors them."""
    mesh = make_mesh(config.Mesh(data=1, expert=4), 4, jax.devices()[:4])

    def layer(x_TD, logits_TE, weights):
        routing = by_token(lambda x_TE, _: TopP(0.6).on_logits(x_TE, ALL[: len(x_TE)]), logits_TE)
        return apply_experts(x_TD, routing, weights, reference_experts, transport=ring)[0]

    def collectives(function):
        text = jax.jit(function).lower(*placed).compile().as_text()
        names = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "collective-permute")
        return {name: n for name in names if (n := text.count(f" {name}("))}

    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, P(EXPERT))
        placed = jax.device_put(case, split)
        assert collectives(layer) == {"all-gather": 3, "reduce-scatter": 1}
        both = jax.grad(lambda *inputs: jnp.sum(jnp.sin(layer(*inputs))), argnums=(0, 1, 2))
        found = collectives(both)
    # Backward: results are gathered, tokens and weights of slots scattered.
    assert found == {"all-gather": 4, "reduce-scatter": 3}
