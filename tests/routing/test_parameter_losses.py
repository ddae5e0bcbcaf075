"""Losses of parameters alone: orthogonality of routers, and coupling of experts with their rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynmoe_jax import config
from dynmoe_jax.model.inputs import TrainingInput, noise_key
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.losses.coupling import Coupling
from dynmoe_jax.routing.losses.simbal import SimBal
from dynmoe_jax.routing.routers import Soft
from tests.training.test_router_states import batch, parts, settings

E, D, F = 8, 16, 6


def value_of(loss, params, valid_T=None, layer_key=None):
    """A loss of parameters, as a layer with some tokens has it."""
    valid_T = jnp.ones(5, bool) if valid_T is None else valid_T
    given = RouterInput(None, jnp.zeros((len(valid_T), E)), valid_T, layer_key=layer_key)
    return loss.value(loss.sums(None, given, params), jnp.maximum(jnp.sum(valid_T), 1))


@partial(jax.jit, static_argnums=(0, 2, 3))
def minimized(loss, params, steps, rate, key=None):
    """Parameters after some steps of that loss alone."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carried, number):
        params, state = carried
        now = None if key is None else jax.random.key_data(jax.random.fold_in(key, number))
        gradient = jax.grad(lambda p: value_of(loss, p, layer_key=now))(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


def drawn(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "router_DE": 0.3 * jax.random.normal(keys[0], (D, E)),
        "gate_up_ED2F": 0.3 * jax.random.normal(keys[1], (E, D, 2 * F)),
    }


def test_orthonormal_rows_and_no_others_have_no_loss():
    rows_DE, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, E)))
    assert value_of(SimBal(), {"router_DE": jnp.float32(rows_DE)}) < 1e-4
    # Twice as long: each of E diagonal entries is 4 in place of 1.
    longer = value_of(SimBal(), {"router_DE": jnp.float32(2 * rows_DE)})
    np.testing.assert_allclose(longer, 3 * E, rtol=1e-4)
    # Two rows alike: two entries besides the diagonal are 1.
    twice_DE = np.eye(D, E)
    twice_DE[:, 1] = twice_DE[:, 0]
    np.testing.assert_allclose(value_of(SimBal(), {"router_DE": jnp.float32(twice_DE)}), 2.0)


def test_its_loss_alone_makes_rows_orthogonal():
    after_DE = np.asarray(minimized(SimBal(), drawn(), 200, 0.03)["router_DE"])
    gram_EE = after_DE.T @ after_DE
    assert np.max(np.abs(gram_EE - np.diag(np.diag(gram_EE)))) < 0.02
    np.testing.assert_allclose(np.diag(gram_EE), 1, atol=0.02)


def test_more_experts_than_dimensions_are_refused():
    model = config.Model(width=8, moe=config.MoE(num_experts=16))
    with pytest.raises(config.ConfigError, match=r"config\.loss\.simbal\.weight=0\.1 needs"):
        config.Config(model=model, loss=config.Loss(simbal={"weight": 0.1}))


@pytest.mark.parametrize("slack", [1.0, 0.5])
def test_coupling_is_its_formula(slack):
    params = drawn()
    row_ED, gate_EDF = np.asarray(params["router_DE"]).T, np.asarray(params["gate_up_ED2F"])
    m = [[np.linalg.norm(row_ED[i] @ gate_EDF[j, :, :F]) for j in range(E)] for i in range(E)]
    wanted = sum(
        max(m[i][j] - slack * m[i][i], 0) + max(m[j][i] - slack * m[i][i], 0)
        for i in range(E)
        for j in range(E)
        if i != j
    )
    found = value_of(Coupling(slack=slack), params)
    np.testing.assert_allclose(found, wanted / E**2, rtol=1e-5)
    # It does not depend on the tokens, and padding alone counts nothing.
    assert found == value_of(Coupling(slack=slack), params, jnp.arange(4) < 2)
    assert value_of(Coupling(), params, jnp.zeros(3, bool)) == 0


def test_rows_of_free_experts_are_coupled_with_nothing():
    params = drawn()
    more_DS = jnp.append(params["router_DE"], jnp.ones((D, 3)), axis=1)
    loss = Coupling(weight=1.0)
    assert value_of(loss, params | {"router_DE": more_DS}) == value_of(loss, params)


def test_coupling_with_slots_is_refused():
    with pytest.raises(config.ConfigError, match=r"coupling\.weight=1\.0 needs counts"):
        settings(
            {"router": "soft", "allow_non_causal": True, "soft": Soft(slots=2)},
            loss=config.Loss(coupling=Coupling(weight=1.0)),
        )


def test_experts_that_project_on_their_own_rows_are_coupled():
    """Whatever the noise: it scales the one number that such a row has."""
    projectors = jnp.eye(E)[:, :, None] * jnp.eye(E)[:, None, :]
    params = {
        "router_DE": jnp.eye(E),
        "gate_up_ED2F": jnp.concatenate([projectors, jnp.ones_like(projectors)], axis=-1),
    }
    for key in (None, jax.random.key_data(jax.random.key(0))):
        assert value_of(Coupling(), params, layer_key=key) == 0


def test_coupling_alone_makes_experts_answer_their_own_rows():
    before = drawn()
    gradient = jax.jit(jax.grad(partial(value_of, Coupling())))(before)
    assert np.any(gradient["router_DE"])
    assert np.any(gradient["gate_up_ED2F"][..., :F])
    assert not np.any(gradient["gate_up_ED2F"][..., F:])
    after = minimized(Coupling(), before, 300, 0.02, jax.random.key(1))
    gate_EDF = after["gate_up_ED2F"][..., :F]
    m_EE = np.linalg.norm(np.einsum("di,jdf->ijf", after["router_DE"], gate_EDF), axis=-1)
    own = np.arange(E)
    assert np.mean((m_EE.argmax(axis=0) == own) & (m_EE.argmax(axis=1) == own)) > 0.95


def test_noise_leaves_a_row_nearest_to_itself():
    row_ED = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    loss, key = Coupling(), jax.random.key(0)
    noise = jax.jit(jax.vmap(lambda i: loss._noise(row_ED, jax.random.fold_in(key, i))))
    factors = noise(jnp.arange(50)) - 1
    # Half the distance of 5, over lengths of 3 and 4.
    assert np.all(np.abs(factors[:, 0]) <= 5 / 6)
    assert np.all(np.abs(factors[:, 1]) <= 5 / 8)
    assert np.max(np.abs(factors[:, 0])) > 0.75
    assert abs(np.mean(factors)) < 0.1


def test_a_step_counts_the_loss_of_experts_once_however_the_batch_is_cut():
    loss = config.Loss(coupling={"weight": 1.0, "slack": 0.5}, balance={"over": "microbatch"})
    cfg = settings({}, microbatches=2, loss=loss)
    init, step = parts(cfg)
    state = jax.jit(init)(jax.random.key(0))
    variables = {path[-1]: leaf[...] for path, leaf in state.params.flat_state()}
    training = TrainingInput(key=noise_key(cfg.seed, state.step))
    wanted = []
    for layer in range(2):
        params = {name: variables[name][layer] for name in ("router_DE", "gate_up_ED2F")}
        key = training.at(layer).layer_key()
        given = RouterInput(None, jnp.zeros((3, 4)), jnp.ones(3, bool), layer_key=key)
        wanted.append(Coupling(slack=0.5).sums(None, given, params)["coupling"] / 3)
    _, metrics = jax.jit(step)(state, batch())
    assert wanted[0] != wanted[1]
    np.testing.assert_allclose(metrics["coupling_loss"], np.mean(wanted), rtol=1e-5)
