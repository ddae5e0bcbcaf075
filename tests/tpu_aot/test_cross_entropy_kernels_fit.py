"""The kernels of the cross-entropy fit into the fast memory of the chips that get them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax.hardware.target import Target, compile_for
from dynmoe_jax.model.kernels.cross_entropy.chunked import cross_entropy_sums
from dynmoe_jax.model.kernels.cross_entropy.tpu_tiles import cross_entropy_tiles

B, L, CHUNK = 3, 2048, 768


# The paper's model, on v5p with a vocabulary that no tile divides; wide models.
@pytest.mark.parametrize(
    ("chip", "width", "vocabulary"),
    [
        pytest.param("v5e", 1024, 32000, marks=pytest.mark.long),
        ("v5p", 1024, 50257),
        pytest.param("v5p", 4096, 8000, marks=pytest.mark.long),
        ("v6e", 1024, 32000),
        pytest.param("v6e", 4096, 8000, marks=pytest.mark.long),
    ],
)
def test_kernels_fit(mesh_of, chip, width, vocabulary):
    mesh, dtype = mesh_of(chip), jnp.bfloat16

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    def loss(x_BLD, output_DV, targets_BL, valid_BL):
        return cross_entropy_sums(x_BLD, output_DV, targets_BL, valid_BL, chunk_tokens=CHUNK)[0]

    with compile_for(Target.of(mesh.devices.flat[0])), jax.set_mesh(mesh):
        assert cross_entropy_tiles(B * L, width, vocabulary, CHUNK, dtype)
        text = (
            jax.jit(jax.grad(loss, argnums=(0, 1)))
            .lower(
                shaped((B, L, width), dtype),
                shaped((width, vocabulary), dtype),
                shaped((B, L), jnp.int32),
                shaped((B, L), jnp.bool_),
            )
            .compile()
            .as_text()
        )
    assert "logit_sums" in text
    assert "logit_gradients" in text
    # No logits in float32 anywhere, nor those of all tokens.
    assert f"f32[{4 * CHUNK},{vocabulary}]" not in text
    assert f"[{B * L},{vocabulary}]" not in text
