"""Attention on heads side by side fits into the fast memory of the chips that get it."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax.model.kernels.attention.flat import flat_attention, flat_obstacle


# The paper's heads; the longest sequences; float32; shared key/value heads; one head to a block.
@pytest.mark.parametrize(
    ("chip", "length", "heads", "kv_heads", "width", "dtype"),
    [
        ("v5e", 2048, 4, 4, 64, jnp.bfloat16),
        ("v5p", 4096, 4, 4, 64, jnp.bfloat16),
        ("v5p", 2048, 6, 2, 64, jnp.float32),
        ("v5p", 2048, 2, 1, 256, jnp.bfloat16),
        ("v6e", 2048, 6, 2, 64, jnp.bfloat16),
        ("v6e", 4096, 2, 1, 128, jnp.bfloat16),
    ],
)
def test_kernels_fit(mesh_of, chip, length, heads, kv_heads, width, dtype):
    assert not flat_obstacle(length, width, heads, kv_heads, dtype)
    sharding = NamedSharding(mesh_of(chip), P())

    def shaped(last, dtype):
        return jax.ShapeDtypeStruct((1, length, *last), dtype, sharding=sharding)

    def loss(query_BLX, key_BLY, value_BLY, segment_ids_BL, rotary_BLP):
        mixed_BLX = flat_attention(query_BLX, key_BLY, value_BLY, segment_ids_BL, rotary_BLP, width)
        return jnp.sum(mixed_BLX.astype(jnp.float32) ** 2)

    inputs = [shaped((count * width,), dtype) for count in (heads, kv_heads, kv_heads)]
    places = shaped((), jnp.int32), shaped((max(width, 128),), jnp.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.lower(*inputs, *places).compile().as_text()
    assert "flat_attention_forward" in text
    assert "flat_attention_backward" in text
