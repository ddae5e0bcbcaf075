"""Adaptive mixtures of local experts: closed forms, who takes which region, and the example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dynmoe_jax.routing import mixture
from examples import adaptive_mixture

TRUE_ED = np.array([[2.0, -1.0, 3.0], [-3.0, 2.0, 1.0]])
SEEDS, STEPS = 8, 150


def test_gradients_are_the_closed_forms():
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.enable_x64(True):
        logits_TE = jnp.asarray(jax.random.normal(keys[0], (5, 3)), jnp.float64)
        output_TED = jnp.asarray(jax.random.normal(keys[1], (5, 3, 2)), jnp.float64)
        target_TD = jnp.asarray(jax.random.normal(keys[2], (5, 2)), jnp.float64)

        def loss(logits_TE, output_TED):
            log_TE = -0.5 * mixture.squared_error(output_TED, target_TD)
            return jnp.sum(mixture.mixture_loss(logits_TE, log_TE))

        value, found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(logits_TE, output_TED)
        h_TE = mixture.responsibilities(
            logits_TE, -0.5 * mixture.squared_error(output_TED, target_TD)
        )
    z_TE, o_TED, y_TD = (np.asarray(x) for x in (logits_TE, output_TED, target_TD))
    p_TE = np.exp(z_TE) / np.exp(z_TE).sum(axis=1, keepdims=True)
    fit_TE = np.exp(-0.5 * ((y_TD[:, None] - o_TED) ** 2).sum(axis=-1))
    wanted_TE = p_TE * fit_TE / (p_TE * fit_TE).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(h_TE, wanted_TE, rtol=1e-12)
    np.testing.assert_allclose(value, -np.log((p_TE * fit_TE).sum(axis=1)).sum(), rtol=1e-12)
    np.testing.assert_allclose(found[0], p_TE - wanted_TE, rtol=1e-9, atol=1e-14)
    pull_TED = -wanted_TE[..., None] * (y_TD[:, None] - o_TED)
    np.testing.assert_allclose(found[1], pull_TED, rtol=1e-9, atol=1e-14)


def test_losses_that_cooperate_and_compete_by_hand():
    logits_E, output_ED = jnp.log(jnp.array([0.25, 0.75])), jnp.array([[1.0, 0.0], [3.0, 2.0]])
    target_D = jnp.array([1.0, 2.0])
    # Errors 0 + 4 and 4 + 0; together 2.5, 1.5 miss by 1.5 and 0.5.
    error_E = mixture.squared_error(output_ED, target_D)
    np.testing.assert_allclose(mixture.competitive_loss(logits_E, error_E), 4.0, rtol=1e-6)
    found = mixture.cooperative_loss(logits_E, output_ED, target_D)
    np.testing.assert_allclose(found, 2.5, rtol=1e-6)


def test_likelihoods_that_float32_cannot_hold():
    found = mixture.mixture_loss(jnp.zeros(2), jnp.array([-1e4, -2e4]))
    np.testing.assert_allclose(found, 1e4 + np.log(2), rtol=1e-6)


def descended(loss):
    """(share of points whose expert is that of their region, largest relative error of weights)
    of each seed: two linear experts and a linear gate on y = a_1 x where x_1 < 0, else a_2 x."""

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        x_TD = jax.random.normal(keys[0], (400, 3))
        region_T = (x_TD[:, 0] >= 0).astype(int)
        y_T1 = jnp.sum(x_TD * jnp.asarray(TRUE_ED)[region_T], axis=-1, keepdims=True)

        def gate(params):
            return x_TD @ params["gate_DE"] + params["bias_E"]

        def objective(params):
            return jnp.mean(loss(gate(params), (x_TD @ params["a_ED"].T)[..., None], y_T1))

        optimizer = optax.adam(0.05)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = {
            "a_ED": 0.3 * jax.random.normal(keys[1], (2, 3)),
            "gate_DE": 0.3 * jax.random.normal(keys[2], (3, 2)),
            "bias_E": jnp.zeros(2),
        }
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
        return params["a_ED"], jnp.mean(jnp.argmax(gate(params), axis=-1) == region_T)

    a_SED, share_S = map(np.asarray, jax.jit(jax.vmap(run))(jnp.arange(SEEDS)))
    off_SEE = np.linalg.norm(a_SED[:, :, None] - TRUE_ED, axis=-1) / np.linalg.norm(TRUE_ED, axis=1)
    straight, swapped = np.trace(off_SEE, axis1=1, axis2=2), off_SEE[:, 0, 1] + off_SEE[:, 1, 0]
    kept_S = straight < swapped
    off_SE = np.where(
        kept_S[:, None],
        np.stack([off_SEE[:, 0, 0], off_SEE[:, 1, 1]], axis=1),
        np.stack([off_SEE[:, 0, 1], off_SEE[:, 1, 0]], axis=1),
    )
    return np.where(kept_S, share_S, 1 - share_S), off_SE.max(axis=1)


def test_experts_take_a_region_each_by_the_likelihood_and_not_by_cooperation():
    share_S, off_S = descended(
        lambda z, o, y: mixture.mixture_loss(z, -0.5 * mixture.squared_error(o, y))
    )
    assert np.all(share_S > 0.95)
    assert np.all(off_S < 0.05)
    # Cooperating experts may find them as well, but later: the gate has to be sharp before.
    _, together_S = descended(mixture.cooperative_loss)
    assert np.median(together_S) > 0.05
    assert np.all(together_S > 2 * off_S)


def test_the_example_prints_both_models_and_draws(tmp_path, capsys):
    adaptive_mixture.main(["--seeds=2", f"--picture={tmp_path}/vowels.png"])
    shown = capsys.readouterr().out
    rights = [float(line.split()[-1].rstrip("%")) for line in shown.splitlines() if " 60 " in line]
    assert len(rights) == 2
    assert min(rights) > 90
    assert "Mean responsibility" in shown
    assert (tmp_path / "vowels.png").stat().st_size > 10_000
