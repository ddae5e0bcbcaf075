"""The norm and the projections of the stream, by kernels on TPU, against plain JAX."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.mesh.collectives import keep_all_but_gathered
from dynmoe_jax.model.kernels.norm import qkv_projection
from dynmoe_jax.model.kernels.norm.qkv_projection import (
    projected,
    projected_by_kernels,
    projection_tile,
)
from dynmoe_jax.model.remat import remat_policy
from tests.close import assert_close

B, L, D, EPSILON = 4, 256, 128, 1e-2
COLUMNS = (384, 128, 128)
TILE = 128  # eight of them, four for each part
V5P, V6E = Target("tpu", "TPU v5"), Target("tpu", "TPU v6 lite")


def draw(dtype=jnp.float32):
    """Stream, scale and matrices; gradients of the stream and of the products."""
    keys = iter(jax.random.split(jax.random.key(0), 10))
    x, dstream = (jax.random.normal(next(keys), (B, L, D)).astype(dtype) for _ in range(2))
    scale = 1 + jax.random.normal(next(keys), (D,)).astype(dtype)
    matrices = tuple(jax.random.normal(next(keys), (D, n)).astype(dtype) for n in COLUMNS)
    dproducts = tuple(jax.random.normal(next(keys), (B, L, n)).astype(dtype) for n in COLUMNS)
    return (x, scale, matrices), (dstream, dproducts)


def by_formula(x_BLD, scale_D, matrices):
    wide = x_BLD.astype(jnp.float32)
    normed = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + EPSILON)
    return x_BLD, tuple((normed * scale_D) @ matrix for matrix in matrices)


def by_kernels(x_BLD, scale_D, matrices):
    return projected_by_kernels(x_BLD, scale_D, matrices, TILE, EPSILON, interpret=True)


def value_and_gradients(project):
    @jax.jit
    def run(inputs, gradients):
        value, pull_back = jax.vjp(project, *inputs)
        return jax.tree.leaves((value, pull_back(gradients)))

    return run


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_equals_the_formula(dtype, tolerance):
    inputs, gradients = draw(dtype)
    actual = value_and_gradients(by_kernels)(inputs, gradients)
    assert {a.dtype for a in actual} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (inputs, gradients))
    assert_close(actual, value_and_gradients(by_formula)(*wide), tolerance)


def test_an_odd_number_of_tiles_is_one_part():
    inputs, gradients = draw()
    (x, *rest), gradients = jax.tree.map(
        lambda a: a[:3, :128] if a.ndim == 3 else a, (inputs, gradients)
    )
    actual = value_and_gradients(by_kernels)((x, *rest), gradients)
    assert_close(actual, value_and_gradients(by_formula)((x, *rest), gradients), 1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run on this CPU, and nothing else does."""

    def kernels(*arguments):
        return projected_by_kernels(*arguments[:5], True)

    monkeypatch.setattr(qkv_projection, "projected_by_kernels", kernels)
    monkeypatch.setattr(qkv_projection, "forked", None)


def on_tpu(x_BLD, scale_D, matrices):
    norm = nnx.RMSNorm(D, epsilon=EPSILON, dtype=x_BLD.dtype, rngs=nnx.Rngs(0))
    norm.scale[...] = scale_D
    query, key, value = matrices
    heads = {
        "query_DHW": query.reshape(D, -1, 64),
        "key_DGW": key.reshape(D, -1, 64),
        "value_DGW": value.reshape(D, -1, 64),
    }
    return projected(norm, x_BLD, heads)


@pytest.mark.parametrize("devices", [1, 4])
def test_each_device_has_its_tokens_and_pieces_of_the_matrices(interpreted, devices):
    inputs, gradients = draw()
    wanted = value_and_gradients(by_formula)(inputs, gradients)
    mesh = jax.make_mesh(
        (1, devices // 2 or 1, 1 + devices // 4, 1), MESH_AXES, (AxisType.Auto,) * 4
    )
    with compile_for(V5P), jax.set_mesh(mesh):
        run = value_and_gradients(on_tpu)
        if devices > 1:
            text = run.lower(inputs, gradients).compile().as_text()
            assert "all-gather" in text
        actual = run(inputs, gradients)
    assert_close(actual, wanted, 1e-5)


def test_other_platforms_and_split_heads_take_plain_products(monkeypatch):
    inputs, _ = draw()
    wanted = by_formula(*inputs)
    monkeypatch.setattr(qkv_projection, "projected_by_kernels", None)
    assert_close(jax.tree.leaves(on_tpu(*inputs)), jax.tree.leaves(wanted), 1e-5)
    mesh = jax.make_mesh((1, 1, 1, 2), MESH_AXES, (AxisType.Auto,) * 4)
    monkeypatch.setattr(qkv_projection, "forked", lambda norm, x, plain: (x, norm(x)))
    with compile_for(V5P), jax.set_mesh(mesh):
        split = jax.jit(on_tpu)(*inputs)
    assert_close(jax.tree.leaves(split), jax.tree.leaves(wanted), 1e-5)


def test_tiles():
    bf16, paper = jnp.bfloat16, [1024] * 3
    with compile_for(V5P):
        assert projection_tile(32768, 1024, paper, bf16) == 512
        assert projection_tile(384, 1024, paper, bf16) == 128
        assert projection_tile(100, 1024, paper, bf16) == 0
        assert projection_tile(32768, 1024, [1024, 64, 64], bf16) == 0
        # 75 MB of matrices and their gradients.
        assert projection_tile(32768, 2048, [2048] * 3, bf16) == 0
    with compile_for(V6E):
        assert projection_tile(32768, 2048, [2048] * 3, bf16) == 128
        assert projection_tile(32768, 4096, [4096, 1024, 1024], bf16) == 0
    assert projection_tile(32768, 1024, paper, bf16) == 0


def test_backward_makes_the_projections_again_from_the_stream(capsys):
    (x, scale, matrices), _ = draw()

    def layer(x, scale):
        stream, products = by_kernels(x @ jnp.eye(D), scale, matrices)
        mixed = sum(jnp.square(p) @ jnp.eye(p.shape[-1], D) for p in products)
        return stream + mixed @ jnp.eye(D)

    def products_kept(policy):
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=policy), x, scale)
        lines = capsys.readouterr().out.splitlines()
        return sum(line.startswith(f"f32[{B},{L},{COLUMNS[0]}]") for line in lines)

    assert products_kept(remat_policy("elementwise")) == 0
    assert products_kept(keep_all_but_gathered) > 0
