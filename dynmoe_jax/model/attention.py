"""Grouped-query attention with causal and segment masking.

Axis legend: B batch, L positions, D model width, H query heads, G key/value heads, W head width,
X = H W and Y = G W heads side by side.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.mesh.sharding import by_batch_and_head
from dynmoe_jax.model.components import compute_dtype, normalize_heads
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.kernels.attention.choice import Attend, attention_of, make_attention
from dynmoe_jax.model.kernels.attention.flat import flat_attention
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.kernels.norm.qkv_projection import projected
from dynmoe_jax.model.linear.kind import attention_shapes
from dynmoe_jax.model.linear.matrices import Matrices
from dynmoe_jax.model.linear.products import times_parameter
from dynmoe_jax.model.masks import full, of_key_heads, whole_mask
from dynmoe_jax.model.rotary import rotate


class Attention(nnx.Module):
    """Causal self-attention within segments; every group of H/G query heads shares one k and v."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        H, G, W = model.num_heads, model.num_kv_heads, model.head_width
        self.matrices = Matrices.drawn(self, model, attention_shapes(model), rngs)
        if model.attention_bias:
            self.query_bias_HW = nnx.Param(jnp.zeros((H, W), jnp.float32))
            self.key_bias_GW = nnx.Param(jnp.zeros((G, W), jnp.float32))
            self.value_bias_GW = nnx.Param(jnp.zeros((G, W), jnp.float32))
        if model.qk_norm:
            self.query_scale_HW = nnx.Param(jnp.ones((H, W), jnp.float32))
            self.key_scale_GW = nnx.Param(jnp.ones((G, W), jnp.float32))
        self.mask_H = full(H) if model.mask_steps else None
        self.bias, self.norm = model.attention_bias, model.qk_norm
        self.epsilon = model.norm_epsilon
        self.width = model.head_width
        self.dtype = compute_dtype(model)
        self.plain = model.plain
        self.attend = make_attention(attention_of(model), current_target())

    def project(
        self, norm: nnx.RMSNorm, x_BLD: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array, Array]]:
        """(the stream, (queries, keys, values)), heads side by side: [B, L, X], [B, L, Y] twice.

        Queries and keys are not yet rotated by their positions.  On TPU lanes are full like this: a
        product that ends in [heads, 64] fills half of them (docs/measurements.md:
        v5p-narrow-heads).

        Args:
          norm: of what is projected.
          x_BLD: the stream.
        """
        x_BLD, (query_BLX, key_BLY, value_BLY) = self._projected(norm, x_BLD)
        if self.bias:
            query_BLX += self.query_bias_HW[...].reshape(-1).astype(self.dtype)
            key_BLY += self.key_bias_GW[...].reshape(-1).astype(self.dtype)
            value_BLY += self.value_bias_GW[...].reshape(-1).astype(self.dtype)
        if self.norm:
            scales = self.query_scale_HW[...].reshape(-1), self.key_scale_GW[...].reshape(-1)
            mask_X, mask_Y = self._masks()
            query_BLX = normalize_heads(query_BLX, scales[0], self.epsilon, mask_X)
            key_BLY = normalize_heads(key_BLY, scales[1], self.epsilon, mask_Y)
        return x_BLD, (query_BLX, key_BLY, value_BLY)

    def _masks(self):
        """(masks of the queries' numbers, of the keys'); None without masks."""
        if self.mask_H is None:
            return None, None
        mask_H = whole_mask("mask_H", self.mask_H)
        mask_G = of_key_heads(mask_H, self.key_scale_GW.shape[0])
        return jnp.repeat(mask_H, self.width), jnp.repeat(mask_G, self.width)

    def _projected(self, norm, x_BLD):
        names = ("query_DHW", "key_DGW", "value_DGW")
        if self.matrices.apply_themselves:
            x_BLD, normed_BLD = forked(norm, x_BLD, self.plain)
            return x_BLD, [self.matrices.applied(self, name, normed_BLD) for name in names]
        matrices = {name: self.matrices.whole(self, name) for name in names}
        return projected(norm, x_BLD, matrices, self.plain)

    def mix(
        self, heads: tuple[Array, Array, Array], positions: TokenPositions
    ) -> Float[Array, "B L D"]:
        """Computes the sum that attention adds to the residual stream.

        Each position attends to the positions of its own segment up to itself.

        Args:
          heads: from :meth:`project`.
          positions: of the tokens.
        """
        return self._back(self.mixed_values(heads, positions))

    def mixed_values(
        self, heads: tuple[Array, Array, Array], positions: TokenPositions
    ) -> Float[Array, "B L X"]:
        """The values that each query head mixes, heads side by side; for arguments see
        :meth:`mix`."""
        layout = positions.segment_ids_BL, positions.rotary_BLR
        return by_batch_and_head(self._mix, *heads, layout)

    def heads_apart(
        self, heads: tuple[Array, Array, Array], rotary_BLR: Float[Array, "B L R"]
    ) -> tuple[Float[Array, "B L H W"], Float[Array, "B L G W"], Float[Array, "B L G W"]]:
        """Queries and keys, rotated by their positions, and values."""
        query_BLHW, key_BLGW, value_BLGW = (
            x_BLX.reshape(*x_BLX.shape[:2], -1, self.width) for x_BLX in heads
        )
        return rotate(query_BLHW, rotary_BLR), rotate(key_BLGW, rotary_BLR), value_BLGW

    def project_back(self, mixed_BLHW: Float[Array, "B L H W"]) -> Float[Array, "B L D"]:
        """The heads' mixed values, back in the residual stream."""
        return self._back(mixed_BLHW.reshape(*mixed_BLHW.shape[:2], -1))

    def _mix(self, query_BLX, key_BLY, value_BLY, layout):
        """Mixed values, side by side, of the heads of one device."""
        heads, (segment_ids_BL, rotary_BLR) = (query_BLX, key_BLY, value_BLY), layout
        if isinstance(self.attend, Attend) and self.attend.takes_flat(*heads[:2], self.width):
            return flat_attention(*heads, segment_ids_BL, rotary_BLR, self.width)
        heads_apart = self.heads_apart(heads, rotary_BLR)
        return self.attend(*heads_apart, segment_ids_BL).reshape(query_BLX.shape)

    def _back(self, mixed_BLX):
        if self.mask_H is not None:
            mask_X = jnp.repeat(whole_mask("mask_H", self.mask_H), self.width)
            mixed_BLX = mixed_BLX * mask_X.astype(mixed_BLX.dtype)
        if self.matrices.apply_themselves:
            return self.matrices.applied(self, "output_HWD", mixed_BLX)
        output_HWD = self.matrices.whole(self, "output_HWD")
        return times_parameter(mixed_BLX, "output_HWD", output_HWD, self.plain)
