"""Soft slots: the two softmaxes against plain numpy, what lengths change, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.routers import Soft, Sphero

S, L, E, D, C = 2, 6, 4, 8, 3
T = S * L
ROUTERS = {"soft": Soft(slots=C), "sphero": Sphero(slots=C, temperature=0.25)}
every = pytest.mark.parametrize("name", ROUTERS)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_of(router):
    keys = jax.random.split(jax.random.key(0), 9)
    declared = router.parameters(D, E).items()
    made = {
        name: draw(i, *parameter.shape)
        if isinstance(parameter.init, str)
        else np.asarray(parameter.init(keys[i], parameter.shape))
        for i, (name, parameter) in enumerate(declared)
    }
    return {name: jnp.asarray(array) for name, array in made.items()}


def decide(router, params, x_TD, valid_T=None, key_T=None, training=False, length=L):
    logits_TZ = router.logits and router.logits(params, x_TD, E)
    logits_TZ = x_TD @ params["router_DE"] if logits_TZ is None else logits_TZ
    valid_T = jnp.ones(len(x_TD), bool) if valid_T is None else valid_T
    seen = RouterInput(x_TD, logits_TZ, valid_T, key_T=key_T, length=length, training=training)
    return router(params, seen)


def softmax(z, axis):
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def by_hand(name, params, x_TD):
    """(dispatch, combine) of one sequence, in float64."""
    params = {key: np.asarray(value, np.float64) for key, value in params.items()}
    if name == "soft":
        logits_TZ = x_TD @ params["router_DE"]
        return softmax(logits_TZ, 0), softmax(logits_TZ, 1)
    phi_ZD = params["router_DE"].T
    centred_ZD = phi_ZD - phi_ZD.mean(axis=1, keepdims=True)
    phi_ZD = centred_ZD / np.sqrt((centred_ZD**2).mean(axis=1, keepdims=True) + 1e-5)
    phi_ZD = phi_ZD * params["slot_scale_D"] + params["slot_bias_D"]
    phi_ZD = phi_ZD / np.linalg.norm(phi_ZD, axis=1, keepdims=True)
    cosine_TZ = x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True) @ phi_ZD.T
    dispatch, combine = np.exp(params["log_dispatch"]), np.exp(params["log_combine"])
    return softmax(cosine_TZ / dispatch, 0), softmax(cosine_TZ / combine, 1)


@every
def test_shares_are_those_of_plain_numpy(name):
    params, x_TD = params_of(ROUTERS[name]), draw(9, T, D)
    params |= {key: params[key] + shift for key, shift in (("log_dispatch", 0.3),) if key in params}
    found = decide(ROUTERS[name], params, x_TD)
    parts = [by_hand(name, params, x_TD[i : i + L].astype(np.float64)) for i in (0, L)]
    for matrix_TEC, hand in zip((found.dispatch_TEC, found.combine_TEC),
                                zip(*parts, strict=True), strict=True):  # fmt: skip
        np.testing.assert_allclose(matrix_TEC.reshape(T, -1), np.concatenate(hand), rtol=1e-4)
    np.testing.assert_allclose(found.probs_TE, found.combine_TEC.sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(found.logits_TE), found.probs_TE, rtol=1e-4)
    # Each slot of a sequence is a mean of its tokens, each output a mean of the slots' outputs.
    np.testing.assert_allclose(found.dispatch_TEC.reshape(S, L, -1).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.combine_TEC.sum(axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_array_equal(found.load_E, [S * C] * E)


@every
def test_only_the_spherical_one_is_blind_to_the_length_of_tokens(name):
    router = ROUTERS[name]
    params, x_TD = params_of(router), draw(9, T, D)
    once, thrice = (decide(router, params, factor * x_TD) for factor in (1, 3))
    same = [
        np.allclose(getattr(once, field), getattr(thrice, field), rtol=1e-4, atol=1e-6)
        for field in ("dispatch_TEC", "combine_TEC")
    ]
    assert same == [name == "sphero"] * 2


@every
def test_slots_and_outputs_are_sums_over_the_own_sequence(name):
    router = ROUTERS[name]
    x_TD = draw(9, T, D)
    soft = decide(router, params_of(router), x_TD)
    slots_SD = soft.slot_inputs(x_TD)
    assert slots_SD.shape == (soft.num_slots, D) == (S * E * C, D)
    y_TD = soft.token_outputs(slots_SD)
    for s in range(S):
        own = slice(s * L, (s + 1) * L)
        mixed_ECD = np.einsum("lec,ld->ecd", soft.dispatch_TEC[own], x_TD[own])
        np.testing.assert_allclose(slots_SD.reshape(S, E, C, D)[s], mixed_ECD, rtol=1e-4, atol=1e-5)
        outputs = np.einsum("lec,ecd->ld", soft.combine_TEC[own], mixed_ECD)
        np.testing.assert_allclose(y_TD[own], outputs, rtol=1e-4, atol=1e-5)
    expert_S = soft.slots_by_token(missing=2).expert_TK[:, 0]
    np.testing.assert_array_equal(expert_S, [*np.tile(np.repeat(np.arange(E), C), S), E, E])
    assert soft.by_token().experts_per_token_T.tolist() == [E] * T


@every
def test_gradients_are_slopes(name):
    router = ROUTERS[name]
    params, x_TD = params_of(router), draw(9, L, D)
    weights = draw(10, 2, L, E * C).astype(np.float64)
    along = {key: draw(11 + i, *value.shape) for i, (key, value) in enumerate(params.items())}

    def loss(params):
        soft = decide(router, params, x_TD)
        pairs = zip(weights, (soft.dispatch_TEC, soft.combine_TEC), strict=True)
        return sum(jnp.sum(w_LZ.astype(np.float32) * m_LEC.reshape(L, -1)) for w_LZ, m_LEC in pairs)

    slopes = jax.tree.map(lambda g, a: np.sum(np.asarray(g, float) * a), jax.grad(loss)(params),
                          along)  # fmt: skip
    step = 1e-6
    for key in params:
        ends = []
        for sign in (1, -1):
            moved = {k: np.asarray(v, np.float64) for k, v in params.items()}
            moved[key] = moved[key] + sign * step * along[key]
            both = by_hand(name, moved, x_TD.astype(np.float64))
            ends.append(sum(np.sum(w * m) for w, m in zip(weights, both, strict=True)))
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(slopes[key], slope, rtol=1e-3, atol=1e-4)


def test_slots_begin_orthogonal():
    phi_DZ = np.asarray(params_of(Sphero(slots=2))["router_DE"])
    np.testing.assert_allclose(phi_DZ.T @ phi_DZ, np.eye(2 * E), atol=1e-5)


def test_noise_is_in_training_alone_and_of_the_size_asked_for():
    router = Sphero(slots=C, noise=1.0)
    params, x_TD = params_of(router), draw(9, 100, D)
    key_T = jax.vmap(lambda i: jax.random.key_data(jax.random.key(i)))(jnp.arange(100))
    run = lambda router, training: np.asarray(  # noqa: E731
        decide(router, params, x_TD, key_T=key_T, training=training, length=100).logits_TE
    )
    quiet = Sphero(slots=C, noise=0.0)
    assert router.reads == {"noise"}
    assert not quiet.reads
    np.testing.assert_array_equal(run(router, False), run(quiet, True))
    one_slot = Sphero(slots=1, noise=1.0)
    params = params_of(one_slot)
    noise_TE = run(one_slot, True) - run(one_slot, False)
    assert np.std(noise_TE) == pytest.approx(1 / E, rel=0.15)
