"""BlockFFN: gates that scale cannot change, and losses by hand and by descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax.routing.losses.activation_locality import ActivationLocality
from dynmoe_jax.routing.losses.chunk_sparsity import ChunkSparsity
from dynmoe_jax.routing.routers import BlockFFN
from tests.routing.given import E, T, given, params_of, replace

ROUTER = BlockFFN()
LOCALITY, CHUNK = ActivationLocality(), ChunkSparsity()
PARAMS = {"gamma_E": jnp.ones(E)}


@jax.jit
def route(logits_TE, gamma_E=PARAMS["gamma_E"]):
    return ROUTER({"gamma_E": gamma_E}, given(ROUTER, logits_TE))


@functools.partial(jax.jit, static_argnames=("loss", "length"))
def value_of(loss, logits_TE, segment_T=None, length=0):
    seen = given(ROUTER, logits_TE, training=True, length=length, reads=loss.reads)
    if segment_T is not None:
        seen = replace(seen, segment_id_T=segment_T, valid_T=segment_T > 0)
    routing = ROUTER(PARAMS, seen)
    return loss.value(loss.sums(routing, seen, {}), jnp.sum(seen.valid_T))


def test_gates_are_the_norm_of_relu_and_zeros_stay_zeros():
    logits_TE = np.asarray(jax.random.normal(jax.random.key(0), (T, E)))
    gamma_E = np.linspace(-1, 2, E, dtype=np.float32)
    routing = route(jnp.asarray(logits_TE), jnp.asarray(gamma_E))
    found_TE = np.zeros((T, E + 1), np.float32)
    np.put_along_axis(found_TE, np.asarray(routing.expert_TK), np.asarray(routing.weight_TK), 1)
    for token, logits_E in enumerate(logits_TE):
        relu_E = np.maximum(logits_E, 0)
        wanted_E = relu_E / np.sqrt(np.mean(relu_E**2) + 1e-6) * gamma_E
        np.testing.assert_allclose(found_TE[token, :E], wanted_E, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(routing.chosen_TE, logits_TE > 0)


def test_the_scale_of_the_router_does_not_matter():
    x_TD = jax.random.normal(jax.random.key(1), (T, 4))
    router_DE = params_of(ROUTER)["router_DE"]
    one, seven = (route(x_TD @ (scale * router_DE)) for scale in (20, 140))
    np.testing.assert_array_equal(one.expert_TK, seven.expert_TK)
    np.testing.assert_allclose(one.weight_TK, seven.weight_TK, atol=1e-5)


def test_a_token_without_an_expert_has_a_finite_gradient():
    def total(logits_TE):
        return jnp.sum(route(logits_TE).weight_TK ** 2)

    assert np.all(np.isfinite(jax.jit(jax.grad(total))(-jnp.ones((T, E)).at[0].set(0.0))))


def test_chunk_loss_where_all_tokens_have_one_expert():
    logits_TE = -jnp.ones((128, E)).at[:, 3].set(-0.5)
    np.testing.assert_allclose(value_of(CHUNK, logits_TE), 1 / E, rtol=2e-6)


def test_chunk_loss_of_even_gates():
    wanted = 1 - (1 - 1 / E) ** 64
    np.testing.assert_allclose(value_of(CHUNK, jnp.ones((128, E))), wanted, rtol=1e-5)


def test_chunks_count_by_their_tokens():
    # Sequences of 5 tokens make chunks of 4 and 1; the last sequence has two tokens.
    logits_TE = jax.random.normal(jax.random.key(2), (15, E)) + 0.3
    segment_T = jnp.array([1] * 12 + [0] * 3)
    found = value_of(ChunkSparsity(tokens=4), logits_TE, segment_T, length=5)
    q_TE = np.maximum(np.asarray(logits_TE), 0)
    q_TE = q_TE / q_TE.sum(axis=1, keepdims=True)
    total = 0.0
    for chunk in (range(4), (4,), range(5, 9), (9,), (10, 11)):
        total += len(chunk) * np.mean(1 - np.prod(1 - q_TE[list(chunk)], axis=0))
    np.testing.assert_allclose(found, total / 12, rtol=1e-5)


def test_locality_looks_at_pairs_of_one_document():
    logits_TE = 0.02 * jax.random.normal(jax.random.key(3), (12, E))
    segment_T = jnp.array([1, 1, 1, 2, 2, 0, 1, 1, 2, 3, 3, 3])  # two sequences of 6
    found = value_of(LOCALITY, logits_TE, segment_T, length=6)
    z_TE = 100 * np.asarray(logits_TE, np.float64)
    total = 0.0
    for first, second in ((0, 1), (1, 2), (3, 4), (6, 7), (9, 10), (10, 11)):
        p_E, target_E = (1 / (1 + np.exp(-z_TE[i])) for i in (first, second))
        total -= np.mean(target_E * np.log(p_E) + (1 - target_E) * np.log(1 - p_E))
    np.testing.assert_allclose(found, total / 11, rtol=1e-5)


def test_chunk_loss_lowers_distinct_experts_at_the_same_mean():
    """Descent on the router alone: the mean is held by a penalty that both arms have."""
    experts, chunk, wanted = 16, 64, 2.0
    topic_C1D = jax.random.normal(jax.random.key(4), (8, 1, 12))
    x_TD = topic_C1D + jax.random.normal(jax.random.key(5), (8, chunk, 12))
    x_TD = x_TD.reshape(-1, 12)

    def descend(weight):
        def objective(params):
            logits_TE = x_TD @ params["w_DE"] + params["b_E"]
            seen = given(ROUTER, logits_TE, training=True)
            routing = ROUTER({"gamma_E": jnp.ones(experts)}, seen)
            count = jnp.mean(jnp.sum(jax.nn.sigmoid(20 * logits_TE), axis=-1))
            value = CHUNK.value(CHUNK.sums(routing, seen, {}), len(x_TD))
            scale = jnp.mean(jnp.square(logits_TE))  # or it would hide behind the soft count
            return weight * value + jnp.square(count - wanted) + jnp.square(scale - 1), routing

        def step(params, _):
            gradient, _ = jax.grad(objective, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), None

        params = {
            "w_DE": 0.3 * jax.random.normal(jax.random.key(6), (12, experts)),
            "b_E": jnp.full(experts, -0.8),
        }
        params, _ = jax.lax.scan(step, params, length=400)
        return objective(params)[1].chosen_TE

    plain_TE, sparse_TE = (np.asarray(jax.jit(descend)(w)) for w in (0.0, 4.0))
    means = [chosen_TE.sum(axis=1).mean() for chosen_TE in (plain_TE, sparse_TE)]
    np.testing.assert_allclose(means, wanted, rtol=0.05)
    distinct = [
        chosen_TE.reshape(-1, chunk, experts).any(axis=1).sum(axis=1).mean()
        for chosen_TE in (plain_TE, sparse_TE)
    ]
    assert distinct[1] < 0.85 * distinct[0]
