"""Grouped-query attention with causal and segment masking.

Axis legend: B batch, L positions, D model width, H query heads, G key/value heads, W head width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model.attention_choice import make_attention
from dynmoe_jax.model.layers import compute_dtype, matrix, rotate
from dynmoe_jax.target import current_target


class Attention(nnx.Module):
    """Causal self-attention within segments; every group of H/G query heads shares one k and v."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, H, G, W = model.width, model.num_heads, model.num_kv_heads, model.head_width
        self.query_DHW = matrix(rngs, (D, H, W), model.init_std)
        self.key_DGW = matrix(rngs, (D, G, W), model.init_std)
        self.value_DGW = matrix(rngs, (D, G, W), model.init_std)
        self.output_HWD = matrix(rngs, (H, W, D), model.init_std)
        self.theta = model.rope_theta
        self.dtype = compute_dtype(model)
        self.attend = make_attention(model.attention, current_target())

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        segment_ids_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        """Each position attends to the positions of its own segment up to itself."""
        query_BLHW = jnp.einsum("bld,dhw->blhw", x_BLD, self.query_DHW[...].astype(self.dtype))
        key_BLGW = jnp.einsum("bld,dgw->blgw", x_BLD, self.key_DGW[...].astype(self.dtype))
        value_BLGW = jnp.einsum("bld,dgw->blgw", x_BLD, self.value_DGW[...].astype(self.dtype))
        mixed_BLHW = self.attend(
            rotate(query_BLHW, positions_BL, self.theta),
            rotate(key_BLGW, positions_BL, self.theta),
            value_BLGW,
            segment_ids_BL,
        )
        return jnp.einsum("blhw,hwd->bld", mixed_BLHW, self.output_HWD[...].astype(self.dtype))
