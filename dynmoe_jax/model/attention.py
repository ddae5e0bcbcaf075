"""Grouped-query attention with causal and segment masking.

Axis legend: B batch, L positions, D model width, H query heads, G key/value heads, W head width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dynmoe_jax import config
from dynmoe_jax.model.attention_choice import make_attention
from dynmoe_jax.model.layers import compute_dtype, matrix, normalize_heads, rotate
from dynmoe_jax.model.sharding import by_batch_and_head, whole_parameter
from dynmoe_jax.target import current_target


class Attention(nnx.Module):
    """Causal self-attention within segments; every group of H/G query heads shares one k and v."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, H, G, W = model.width, model.num_heads, model.num_kv_heads, model.head_width
        self.query_DHW = matrix(rngs, (D, H, W), model.init_std)
        self.key_DGW = matrix(rngs, (D, G, W), model.init_std)
        self.value_DGW = matrix(rngs, (D, G, W), model.init_std)
        self.output_HWD = matrix(rngs, (H, W, D), model.init_std)
        if model.attention_bias:
            self.query_bias_HW = nnx.Param(jnp.zeros((H, W), jnp.float32))
            self.key_bias_GW = nnx.Param(jnp.zeros((G, W), jnp.float32))
            self.value_bias_GW = nnx.Param(jnp.zeros((G, W), jnp.float32))
        if model.qk_norm:
            self.query_scale_HW = nnx.Param(jnp.ones((H, W), jnp.float32))
            self.key_scale_GW = nnx.Param(jnp.ones((G, W), jnp.float32))
        self.bias, self.norm = model.attention_bias, model.qk_norm
        self.epsilon = model.norm_epsilon
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
        projected = self.project(x_BLD, positions_BL)
        return self.project_back(by_batch_and_head(self.attend, *projected, segment_ids_BL))

    def project(
        self, x_BLD: Float[Array, "B L D"], positions_BL: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B L H W"], Float[Array, "B L G W"], Float[Array, "B L G W"]]:
        """Queries and keys, rotated by their positions, and values."""
        query_BLHW = jnp.einsum("bld,dhw->blhw", x_BLD, self._whole("query_DHW"))
        key_BLGW = jnp.einsum("bld,dgw->blgw", x_BLD, self._whole("key_DGW"))
        value_BLGW = jnp.einsum("bld,dgw->blgw", x_BLD, self._whole("value_DGW"))
        if self.bias:
            query_BLHW += self.query_bias_HW[...].astype(self.dtype)
            key_BLGW += self.key_bias_GW[...].astype(self.dtype)
            value_BLGW += self.value_bias_GW[...].astype(self.dtype)
        if self.norm:
            query_BLHW = normalize_heads(query_BLHW, self.query_scale_HW[...], self.epsilon)
            key_BLGW = normalize_heads(key_BLGW, self.key_scale_GW[...], self.epsilon)
        query_BLHW = rotate(query_BLHW, positions_BL, self.theta)
        return query_BLHW, rotate(key_BLGW, positions_BL, self.theta), value_BLGW

    def project_back(self, mixed_BLHW: Float[Array, "B L H W"]) -> Float[Array, "B L D"]:
        """The heads' mixed values, back in the residual stream."""
        return jnp.einsum("blhw,hwd->bld", mixed_BLHW, self._whole("output_HWD"))

    def _whole(self, name: str) -> Array:
        return whole_parameter(name, getattr(self, name)[...], self.dtype)
