"""The fork before experts, by kernels on TPU, against plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.model.components import added
from dynmoe_jax.model.kernels.norm.router_logits import logits_by_kernels, norm_and_logits, summands
from dynmoe_jax.model.kernels.norm.token_tiles import over_tiles
from dynmoe_jax.model.remat import remat_policy
from tests.close import assert_close

B, L, D, E, EPSILON = 4, 80, 128, 6, 1e-2


def draw(dtype=jnp.float32):
    """(stream, scale, router), and gradients of the three results."""
    keys = jax.random.split(jax.random.key(0), 6)
    x, dstream, dnormed = (jax.random.normal(key, (B, L, D)).astype(dtype) for key in keys[:3])
    scale = 1 + jax.random.normal(keys[3], (D,)).astype(dtype)
    router, dlogits = jax.random.normal(keys[4], (D, E)), jax.random.normal(keys[5], (B, L, E))
    return (x, scale, router), (dstream, dnormed, dlogits)


def by_formula(x_BLD, scale_D, router_DE):
    wide = x_BLD.astype(jnp.float32)
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    normed = (wide / jnp.sqrt(mean + EPSILON) * scale_D.astype(jnp.float32)).astype(x_BLD.dtype)
    return x_BLD, normed, normed.astype(jnp.float32) @ router_DE


def by_kernel(*inputs):
    return logits_by_kernels(*inputs, EPSILON, interpret=True)


def value_and_gradients(fork):
    @jax.jit
    def run(inputs, gradients):
        value, pull_back = jax.vjp(fork, *inputs)
        return *value, *pull_back(gradients)

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_equals_the_formula(monkeypatch, dtype, tolerance):
    monkeypatch.setattr("dynmoe_jax.model.kernels.norm.token_tiles.TOKEN_TILE_ELEMENTS", 16 * D)
    inputs, gradients = draw(dtype)
    actual = value_and_gradients(by_kernel)(inputs, gradients)
    assert [a.dtype for a in actual] == [dtype, dtype, jnp.float32, dtype, dtype, jnp.float32]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, gradients))
    assert_close(actual, value_and_gradients(by_formula)(*wide), tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_factors_in_the_compute_type_lose_nothing(dtype):
    keys = jax.random.split(jax.random.key(1), 2)
    left, right = jax.random.normal(keys[0], (2, 5, E)), jax.random.normal(keys[1], (D, E))
    parts = jax.jit(partial(summands, dtype=dtype))(left, right)
    assert [part.dtype for part in parts] == [dtype] * 2
    found = np.einsum("bls,ds->bld", *(np.asarray(part, np.float64) for part in parts))
    exact = np.einsum("ble,de->bld", *(np.asarray(a, np.float64) for a in (left, right)))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-6)


def test_each_device_has_its_tokens():
    inputs, gradients = draw()
    wanted = value_and_gradients(by_formula)(inputs, gradients)
    with jax.set_mesh(jax.make_mesh((1, 2, 1, 2), MESH_AXES, (AxisType.Auto,) * 4)):
        actual = value_and_gradients(by_kernel)(inputs, gradients)
        assert len(actual[3].sharding.device_set) == 4
    assert_close(actual, wanted, 1e-6)


def test_kernels_on_tpu_alone_and_logits_are_kept(monkeypatch, capsys):
    (x, scale, router), _ = draw()
    norm = nnx.RMSNorm(D, epsilon=EPSILON, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = scale

    def loss(x, router):
        x, normed, logits = norm_and_logits(norm, x, router)
        return jnp.sum(jnp.sin(normed)) + jnp.sum(jnp.sin(logits))

    plain = jax.value_and_grad(loss, argnums=(0, 1))(x, router)

    def interpreted(*inputs):
        return logits_by_kernels(*inputs[:4], True)

    monkeypatch.setattr(
        "dynmoe_jax.model.kernels.norm.router_logits.logits_by_kernels", interpreted
    )
    kept = jax.checkpoint(loss, policy=remat_policy("elementwise"))
    with compile_for(Target("tpu", "TPU v5")):
        assert "pallas_call" in str(jax.make_jaxpr(loss)(x, router))
        by_kernels = jax.value_and_grad(kept, argnums=(0, 1))(x, router)
        jax.ad_checkpoint.print_saved_residuals(kept, x, router)
    # The norm is made again, logits are not.
    shapes = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "named" in line]
    assert shapes == [f"f32[{B},{L},{E}]"]
    assert_close(jax.tree.leaves(by_kernels), jax.tree.leaves(plain), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_stream_is_added_alike_by_a_kernel(monkeypatch, dtype):
    """Two numbers in bfloat16 and their sum, rounded once, and a gradient for each of them."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, y, gradient = (jax.random.normal(key, (B * L, D)).astype(dtype) for key in keys)
    wanted, pull_back = jax.vjp(added, x, y)
    np.testing.assert_array_equal(wanted, (x.astype(jnp.float32) + y).astype(dtype))
    interpreted = partial(over_tiles, interpret=True)
    monkeypatch.setattr("dynmoe_jax.model.components.over_tiles", interpreted)
    with compile_for(Target("tpu", "TPU v5")):
        by_kernel = jax.jit(added)
        assert "pallas_call" in str(jax.make_jaxpr(by_kernel)(x, y))
        np.testing.assert_array_equal(by_kernel(x, y), wanted)
    for found in pull_back(gradient):
        np.testing.assert_array_equal(found, gradient)
