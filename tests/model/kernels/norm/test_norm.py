"""The fork before each half of a layer, by kernels on TPU, against plain JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.model.kernels.norm.norm import forked, forked_by_kernels
from dynmoe_jax.model.kernels.norm.token_tiles import token_tile
from dynmoe_jax.model.remat import remat_policy
from tests.close import assert_close

B, L, D, EPSILON = 4, 80, 128, 1e-2


def draw(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dstream, dnormed = (jax.random.normal(key, (B, L, D)).astype(dtype) for key in keys[:3])
    return x, 1 + jax.random.normal(keys[3], (D,)).astype(dtype), (dstream, dnormed)


def by_formula(x_BLD, scale_D):
    wide = x_BLD.astype(jnp.float32)
    mean = jnp.mean(wide**2, axis=-1, keepdims=True)
    normed = wide / jnp.sqrt(mean + EPSILON) * scale_D.astype(jnp.float32)
    return x_BLD, normed.astype(x_BLD.dtype)


def by_kernel(x_BLD, scale_D):
    return forked_by_kernels(x_BLD, scale_D, EPSILON, interpret=True)


def value_and_gradients(fork):
    @jax.jit
    def run(x_BLD, scale_D, gradients):
        value, pull_back = jax.vjp(fork, x_BLD, scale_D)
        return *value, *pull_back(gradients)

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_equals_the_formula(monkeypatch, dtype, tolerance):
    # Twenty tiles, each with a sum of its own for the scale.
    monkeypatch.setattr("dynmoe_jax.model.kernels.norm.token_tiles.TOKEN_TILE_ELEMENTS", 16 * D)
    x, scale, gradients = draw(dtype)
    actual = value_and_gradients(by_kernel)(x, scale, gradients)
    assert [a.dtype for a in actual] == [dtype] * 4
    wide = [a.astype(jnp.float32) for a in (x, scale)]
    wide_gradients = tuple(g.astype(jnp.float32) for g in gradients)
    assert_close(actual, value_and_gradients(by_formula)(*wide, wide_gradients), tolerance)


def test_each_device_has_its_tokens():
    inputs = draw()
    wanted = value_and_gradients(by_formula)(*inputs)
    with jax.set_mesh(jax.make_mesh((1, 2, 1, 2), MESH_AXES, (AxisType.Auto,) * 4)):
        actual = value_and_gradients(by_kernel)(*inputs)
        assert len(actual[2].sharding.device_set) == 4
    assert_close(actual, wanted, 1e-6)


def test_other_platforms_get_the_same_from_flax(monkeypatch):
    x, scale, _ = draw()
    norm = nnx.RMSNorm(D, epsilon=EPSILON, dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.scale[...] = scale
    interpreted = partial(forked_by_kernels, interpret=True)
    monkeypatch.setattr("dynmoe_jax.model.kernels.norm.norm.forked_by_kernels", interpreted)
    with compile_for(Target("tpu", "TPU v5")):
        assert "pallas_call" in str(jax.make_jaxpr(lambda x: forked(norm, x))(x))
        on_tpu = forked(norm, x)
    assert_close(on_tpu, by_formula(x, scale), 1e-6)
    assert_close(forked(norm, x), by_formula(x, scale), 1e-6)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda x: forked(norm, x))(x))


def test_tiles_of_tokens():
    assert token_tile(32768, 1024) == 256
    assert token_tile(4096, 8192) == 32
    assert token_tile(320, 1024) == 160
    assert token_tile(32768, 1000) == 0
    assert token_tile(8, 1024) == 0


def test_backward_computes_the_norm_again_from_the_stream(capsys):
    x, scale, _ = draw()

    def layer(x, scale):
        stream, normed = by_kernel(x @ jnp.eye(D), scale)
        return stream + jnp.sin(normed @ jnp.eye(D)) @ jnp.eye(D)

    kept = jax.checkpoint(layer, policy=remat_policy("elementwise"))
    jax.ad_checkpoint.print_saved_residuals(kept, x, scale)
    wide = [line for line in capsys.readouterr().out.splitlines() if f"f32[{B},{L},{D}]" in line]
    # The stream, and what is in the sine; not the norm.
    assert sum("dot_general" in line for line in wide) == 2
    assert not [line for line in wide if "custom_vjp" in line]
