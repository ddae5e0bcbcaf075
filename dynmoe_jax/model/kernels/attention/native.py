"""Attention on CPU by kernels of our own; :mod:`.tiled` is the twin in JAX.

Tiles of queries by keys as there, but a tile stays in the cache from its scores to what it adds,
starts at the first of its segments, and takes heads where the projections leave them.

Axis legend: B batch, L positions, H query heads, G key/value heads, W head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.hardware.native import library


def native_attention(
    query_BLHW: Float[Array, "B L H W"],
    key_BLGW: Float[Array, "B L G W"],
    value_BLGW: Float[Array, "B L G W"],
    segment_ids_BL: Int[Array, "B L"],
) -> Float[Array, "B L H W"]:
    """Each position attends to those of its own segment up to itself, in float32.

    Raises:
      NotAvailableError: the kernels cannot be compiled here.
    """
    library.load()
    return _native_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)


@jax.custom_vjp
def _native_attention(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL):
    return _native_attention_forward(query_BLHW, key_BLGW, value_BLGW, segment_ids_BL)[0]


def _native_attention_forward(*operands):
    batch, length, heads, _ = operands[0].shape
    results = (_like(operands[0]), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32))
    mixed_BLHW, log_sum_BHL = jax.ffi.ffi_call("dynmoe_attention", results)(*operands)
    return mixed_BLHW, (*operands, mixed_BLHW, log_sum_BHL)


def _native_attention_backward(residuals, dmixed_BLHW):
    results = tuple(_like(array) for array in residuals[:3])
    call = jax.ffi.ffi_call("dynmoe_attention_gradient", results)
    return *call(*residuals, dmixed_BLHW), None


_native_attention.defvjp(_native_attention_forward, _native_attention_backward)


def _like(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, jnp.float32)
