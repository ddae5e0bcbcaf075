"""The kernels of norm and projections fit into the fast memory of the chips that get them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.model.kernels.norm.qkv_projection import projected, projection_tile

pytestmark = pytest.mark.slow

B, L = 4, 1024
HEADS = {"query_DHW": 0, "key_DGW": 1, "value_DGW": 1}


# The paper's width; with shared keys, the widest that fit; all that 128 MiB of fast memory hold.
@pytest.mark.parametrize(
    ("chip", "width", "columns", "dtype"),
    [
        pytest.param("v5e", 1024, (1024, 1024), jnp.bfloat16, marks=pytest.mark.long),
        ("v5p", 1024, (1024, 1024), jnp.bfloat16),
        pytest.param("v5p", 1024, (1024, 256), jnp.float32, marks=pytest.mark.long),
        pytest.param("v5p", 2048, (1024, 256), jnp.bfloat16, marks=pytest.mark.long),
        ("v6e", 2048, (2048, 2048), jnp.bfloat16),
        pytest.param("v6e", 4096, (2048, 256), jnp.bfloat16, marks=pytest.mark.long),
    ],
)
def test_kernels_fit(mesh_of, chip, width, columns, dtype):
    mesh = mesh_of(chip)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    matrices = {
        name: shaped((width, columns[i] // 64, 64), jnp.float32) for name, i in HEADS.items()
    }

    def loss(x_BLD, scale_D, matrices):
        norm = nnx.RMSNorm(width, dtype=dtype, rngs=nnx.Rngs(0))
        norm.scale[...] = scale_D
        stream_BLD, products = projected(norm, x_BLD, matrices)
        return sum(jnp.sum(a.astype(jnp.float32) ** 2) for a in (stream_BLD, *products))

    with compile_for(Target.of(mesh.devices.flat[0])), jax.set_mesh(mesh):
        assert projection_tile(B * L, width, [columns[i] for i in HEADS.values()], dtype)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        arguments = shaped((B, L, width), dtype), shaped((width,), jnp.float32), matrices
        text = gradient.lower(*arguments).compile().as_text()
    assert "projection_forward" in text
    assert "projection_backward" in text
