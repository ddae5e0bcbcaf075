"""Routing losses, with the arithmetic by hand."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.routing import RouterInput, Routing, TopK, TopP
from dynmoe_jax.routing.losses import RoutingLoss
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.losses.entropy import Entropy
from dynmoe_jax.routing.losses.router_z import RouterZ

T, E = 8, 4
ALL = jnp.ones(T, bool)


def sums_of(loss, routing, valid_T):
    """The sums of a loss over the valid tokens of a routing."""
    return loss.sums(routing, RouterInput(None, routing.logits_TE, valid_T), {})


# Jitted: eagerly, every small operation compiles on its own.
@partial(jax.jit, static_argnums=0)
def value_of(loss, routing, valid_T):
    """The loss of a routing, a mean over the valid tokens."""
    return loss.value(sums_of(loss, routing, valid_T), jnp.maximum(jnp.sum(valid_T), 1))


LOSSES = {
    "balance": Balance(),
    "per_choice": Balance(counts="per_choice"),
    "first_choice_only": Balance(counts="first_choice_only"),
    "entropy": Entropy(),
    "z": RouterZ(),
}
balance_loss = partial(value_of, LOSSES["balance"])
entropy_loss = partial(value_of, LOSSES["entropy"])
router_z_loss = partial(value_of, LOSSES["z"])


def route(router, logits_TE, valid_T=ALL):
    return jax.jit(router.on_logits)(logits_TE, valid_T)


def even_routing(k, shift=0.0):
    """Flat probabilities, every expert chosen equally often: token t takes t, t+1, … (mod E)."""
    expert_TK = (jnp.arange(T)[:, None] + jnp.arange(k)) % E
    probs_TE = jnp.full((T, E), 1 / E)
    return Routing(expert_TK, jnp.full((T, k), 1 / E), probs_TE, jnp.full((T, E), shift), E)


def collapsed_routing():
    """Every token takes expert 0 with certainty."""
    return route(TopK(1), jnp.zeros((T, E)).at[:, 0].set(100.0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_of_even_routing_is_k(k):
    # f_e = k/E, Q_e = 1/E: E * sum_e (k/E)(1/E) = E * E * k/E^2 = k.
    np.testing.assert_allclose(balance_loss(even_routing(k), ALL), k, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_balance_per_choice_of_even_routing_is_one(k):
    # f is divided by its sum k: E * sum_e (1/E)(1/E) = 1, whatever k.
    loss = value_of(LOSSES["per_choice"], even_routing(k), ALL)
    np.testing.assert_allclose(loss, 1.0, rtol=1e-6)
    first = value_of(LOSSES["first_choice_only"], even_routing(k), ALL)
    np.testing.assert_allclose(first, 1.0, rtol=1e-6)


def test_balance_of_collapse_is_e():
    # f = Q = (1, 0, 0, 0): E * 1 * 1 = 4, the worst there is for k = 1.
    np.testing.assert_allclose(balance_loss(collapsed_routing(), ALL), E, rtol=1e-6)


def test_balance_of_two_unlike_tokens():
    # p = 0.6 takes {0, 1} of the first token and {1} of the second:
    # f = (1/2, 1, 0), Q = ((.5+.1)/2, (.3+.8)/2, (.2+.1)/2) = (.3, .55, .15).
    # sum: 3 (.15 + .55) = 2.1; per choice: f / 1.5, so 1.4.
    # first choice: f = (1/2, 1/2, 0), so 3 (.15 + .275) = 1.275.
    logits_TE = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]))
    routing, valid_T = route(TopP(0.6), logits_TE, ALL[:2]), ALL[:2]
    for counts, wanted in [("sum", 2.1), ("per_choice", 1.4), ("first_choice_only", 1.275)]:
        loss = value_of(Balance(counts=counts), routing, valid_T)
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_balance_gradient_is_that_of_the_probabilities_alone():
    # dL/dQ_e = E f_e and f is a constant: for p = softmax, dL/dlogit = (E/T) p (f - sum p f).
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    router = TopP(0.5)
    gradient = jax.jit(jax.grad(lambda x: balance_loss(router.on_logits(x, ALL), ALL)))(logits_TE)
    routing = route(router, logits_TE)
    p_TE, f_E = np.asarray(routing.probs_TE), np.mean(routing.chosen_TE, axis=0)
    wanted = E / T * p_TE * (f_E - p_TE @ f_E[:, None])
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_entropy_of_uniform_is_log_e():
    np.testing.assert_allclose(entropy_loss(even_routing(1), ALL), math.log(E), rtol=1e-6)


def test_entropy_of_one_hot_is_zero():
    np.testing.assert_allclose(entropy_loss(collapsed_routing(), ALL), 0.0, atol=1e-6)


def test_entropy_by_hand():
    # -(.5 ln .5 + .25 ln .25 + .25 ln .25) = 1.5 ln 2.
    logits_TE = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    routing = route(TopP(0.4), logits_TE, ALL[:1])
    np.testing.assert_allclose(entropy_loss(routing, ALL[:1]), 1.5 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize("shift", [-3.0, 0.0, 5.0])
def test_z_loss_of_constant_logits(shift):
    # logsumexp of E equal logits a is a + log E.
    np.testing.assert_allclose(
        router_z_loss(even_routing(1, shift), ALL), (shift + math.log(E)) ** 2, rtol=1e-5
    )


def test_z_loss_gradient_by_hand():
    # d z^2 / d logit = 2 z softmax, a T-th of it per token.
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    gradient = jax.jit(jax.grad(lambda x: router_z_loss(TopK(1).on_logits(x, ALL), ALL)))(logits_TE)
    z_T1 = jax.nn.logsumexp(logits_TE, axis=-1, keepdims=True)
    wanted = 2 * z_T1 * jax.nn.softmax(logits_TE) / T
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)


def value_and_gradient(name, router):
    """Jitted (logits, valid) -> loss and its gradient."""

    def loss(logits_TE, valid_T):
        return value_of(LOSSES[name], router.on_logits(logits_TE, valid_T), valid_T)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", LOSSES)
def test_masking_and_extremes(name):
    """One compiled function, many inputs."""
    compute = value_and_gradient(name, TopP(0.5))
    logits_TE = jax.random.normal(jax.random.key(0), (T, E))
    valid_T = jnp.arange(T) % 3 > 0

    # Padding tokens hold anything: value and gradient are as if they held zeros.
    clean, clean_gradient = compute(jnp.where(valid_T[:, None], logits_TE, 0.0), valid_T)
    for poison in (jnp.nan, jnp.inf):
        value, gradient = compute(jnp.where(valid_T[:, None], logits_TE, poison), valid_T)
        assert value == clean
        np.testing.assert_array_equal(gradient, clean_gradient)
    np.testing.assert_array_equal(clean_gradient[~valid_T], 0.0)
    assert np.any(np.asarray(clean_gradient[valid_T]) != 0)

    # No valid token at all: 0, not 0/0.
    value, gradient = compute(jnp.full((T, E), jnp.nan), jnp.zeros(T, bool))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)

    # Logits so far apart that probabilities underflow to 0.
    value, gradient = compute(jnp.zeros((T, E)).at[:, 0].set(1e4).at[:, 1].set(-1e4), ALL)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_is_as_if_it_were_not_there(name):
    logits_TE = jax.random.normal(jax.random.key(3), (T, E))
    valid_T = jnp.arange(T) < 5
    padded = value_of(LOSSES[name], route(TopP(0.5), logits_TE, valid_T), valid_T)
    short = value_of(LOSSES[name], route(TopP(0.5), logits_TE[:5], ALL[:5]), ALL[:5])
    np.testing.assert_allclose(padded, short, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_stack_of_layers_gives_a_vector(name):
    layers = [route(TopP(0.5), jax.random.normal(jax.random.key(i), (T, E))) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    losses_N = value_of(LOSSES[name], stacked, ALL)
    assert losses_N.shape == (3,)
    wanted = [value_of(LOSSES[name], routing, ALL) for routing in layers]
    np.testing.assert_allclose(losses_N, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_sums_of_microbatches_add_up(name):
    """So a loss of sums is that of the whole batch, however it is cut."""
    logits_TE, valid_T = jax.random.normal(jax.random.key(4), (T, E)), jnp.arange(T) != 2
    loss, sums = LOSSES[name], jax.jit(sums_of, static_argnums=0)
    whole = sums(loss, route(TopP(0.5), logits_TE, valid_T), valid_T)
    halves = [
        sums(loss, route(TopP(0.5), logits_TE[half], valid_T[half]), valid_T[half])
        for half in (slice(0, T // 2), slice(T // 2, T))
    ]
    added = jax.tree.map(jnp.add, *halves)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), added, whole)


def test_which_losses_are_means_of_their_microbatches():
    """The product of two means is not linear, so balance within parts is another loss."""
    assert not Balance().additive
    assert Balance(over="microbatch").additive
    assert Entropy().additive
    assert RouterZ().additive


def test_losses_of_probabilities_do_not_change_with_the_gates():
    routing = even_routing(2)
    other = dataclasses.replace(routing, weight_TK=jnp.full_like(routing.weight_TK, jnp.nan))
    for loss in LOSSES.values():
        assert value_of(loss, routing, ALL) == value_of(loss, other, ALL)


@dataclasses.dataclass(frozen=True)
class Gates(RoutingLoss):
    """The sum of a token's gates."""

    weight: float = 1.0

    def sums(self, routing, given, params):
        return {"gates": jnp.sum(routing.weight_TK)}

    def value(self, sums, tokens):
        return sums["gates"] / tokens


def test_a_loss_may_read_the_gates_and_has_their_gradient():
    # d p_i / d logit_i = p_i (1 - p_i), a T-th of it per token.
    logits_TE = jax.random.normal(jax.random.key(5), (T, E))
    of_logits = lambda x: value_of(Gates(), TopK(1).on_logits(x, ALL), ALL)  # noqa: E731
    gradient = jax.jit(jax.grad(of_logits))(logits_TE)
    p_T = jnp.max(jax.nn.softmax(logits_TE), axis=-1)
    np.testing.assert_allclose(jnp.max(gradient, axis=-1), p_T * (1 - p_T) / T, rtol=1e-5)


# ── What balance is asked of ─────────────────────────────────────────────────────────────────────


def halves():
    """Two shards whose routers are confident of the other half of the experts each."""
    half = jnp.arange(T) % (E // 2)
    return [route(TopK(1), 60.0 * jax.nn.one_hot(half + i * E // 2, E)) for i in range(2)]


def gradient_of_first(loss, logits_TE, over_both):
    """Gradient of the probabilities of one shard, alone or as a part of the batch."""
    other = sums_of(loss, halves()[1], ALL)

    def value(logits_TE):
        # Nearly even probabilities, so that softmax has a slope, and the choices of the shard.
        chosen = dataclasses.replace(halves()[0], probs_TE=jax.nn.softmax(logits_TE))
        sums = sums_of(loss, chosen, ALL)
        if over_both:
            return loss.value(jax.tree.map(jnp.add, sums, other), 2 * T)
        return loss.value(sums, T)

    return jax.jit(jax.grad(value))(logits_TE)


def test_halves_that_complement_each_other_are_balanced_together_and_not_alone():
    one, other = halves()
    loss = Balance()
    for half in (one, other):
        np.testing.assert_allclose(value_of(loss, half, ALL), 2.0, rtol=1e-6)
    together = jax.tree.map(jnp.add, *(sums_of(loss, half, ALL) for half in (one, other)))
    np.testing.assert_allclose(loss.value(together, 2 * T), 1.0, rtol=1e-6)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), one, other)
    np.testing.assert_allclose(value_of(loss, both, jnp.ones(2 * T, bool)), 1.0, rtol=1e-6)
    lean_TE = jax.random.normal(jax.random.key(0), (T, E))
    np.testing.assert_allclose(gradient_of_first(loss, lean_TE, True), 0, atol=1e-7)
    assert np.max(np.abs(gradient_of_first(loss, lean_TE, False))) > 1e-2


@partial(jax.jit, static_argnums=(0, 3))
def by_sequence(loss, routing, valid_T, length):
    given = RouterInput(None, routing.logits_TE, valid_T, length=length)
    sums = loss.sums(routing, given, {})
    return loss.value(sums, jnp.maximum(jnp.sum(valid_T), 1))


@pytest.mark.parametrize("counts", ["sum", "per_choice", "first_choice_only"])
def test_balance_of_sequences_is_the_mean_of_each_ones(counts):
    """Weighed by their valid tokens; one of padding alone counts nothing."""
    logits_TE = jax.random.normal(jax.random.key(6), (3 * T, E))
    valid_T = jnp.ones(3 * T, bool).at[T + 5 :].set(False)
    routing = route(TopP(0.5), logits_TE, valid_T)
    loss = Balance(counts=counts, over="sequence")
    parts = [(slice(0, T), 8), (slice(T, T + 5), 5)]
    wanted = sum(
        n * value_of(Balance(counts=counts), jax.tree.map(lambda x, p=p: x[p], routing), ALL[:n])
        for p, n in parts
    )
    np.testing.assert_allclose(by_sequence(loss, routing, valid_T, T), wanted / 13, rtol=1e-5)
    assert loss.additive
    assert not loss.by_microbatch
    # Sequences that complement each other are not balanced, though all together are.
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *halves())
    all_T = jnp.ones(2 * T, bool)
    np.testing.assert_allclose(by_sequence(loss, both, all_T, T), 2, rtol=1e-6)
    np.testing.assert_allclose(by_sequence(loss, both, all_T, 2 * T), 1, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("groups", [0, 2, 4])
def test_even_load_of_groups_is_one(k, groups):
    loss = Balance(counts="per_choice", groups=groups)
    np.testing.assert_allclose(value_of(loss, even_routing(k), ALL), 1.0, rtol=1e-6)


def test_balance_of_groups_by_hand():
    routing = route(TopP(0.5), jax.random.normal(jax.random.key(7), (T, E)))
    f_E, q_E = np.mean(routing.chosen_TE, axis=0), np.mean(routing.probs_TE, axis=0)
    mean = [E * (f_E[0] + f_E[1]) / 2, E * (f_E[2] + f_E[3]) / 2]
    wanted = mean[0] * (q_E[0] + q_E[1]) + mean[1] * (q_E[2] + q_E[3])
    np.testing.assert_allclose(value_of(Balance(groups=2), routing, ALL), wanted, rtol=1e-5)
    # One expert in each group: the loss of experts.
    alone, each = (value_of(Balance(groups=g), routing, ALL) for g in (0, E))
    np.testing.assert_allclose(each, alone, rtol=1e-6)
    # Two experts of one group that share its load unevenly are none of its business.
    uneven = route(TopK(1), 60.0 * jax.nn.one_hot(2 * (jnp.arange(T) % 2), E))
    np.testing.assert_allclose(value_of(Balance(groups=2), uneven, ALL), 1.0, rtol=1e-6)
    np.testing.assert_allclose(value_of(Balance(), uneven, ALL), 2.0, rtol=1e-6)


@pytest.mark.parametrize("groups", [3, 1])
def test_groups_that_do_not_divide_the_experts_are_refused(groups):
    model = config.Model(moe=config.MoE(num_experts=4))
    with pytest.raises(config.ConfigError, match=rf"config\.loss\.balance\.groups={groups} "):
        config.Config(model=model, loss=config.Loss(balance={"groups": groups}))
