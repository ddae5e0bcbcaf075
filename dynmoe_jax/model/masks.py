"""Masks of a model that has grown: what is new counts as little as its masks say.

At 0 a new part does nothing, whatever its weights are; at 1 it is like any other (Masked Structural
Growth, arXiv 2305.02869).  Whatever is added to the stream is multiplied by the mask of the width,
hidden units by that of the hidden width, what heads have mixed by that of the heads; a layer is
``m layer(x) + (1 - m) x``.  Masking hidden units is masking the rows of the matrix behind them, so
kernels need not know of it.

Axis legend: B batch, L positions, D model width, F hidden width, H query heads, G key/value heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.mesh.sharding import whole_parameter

MASK_NAMES = ("mask_D", "mask_F", "mask_H", "shared_mask_F", "layer_mask")
"""Names of all masks."""


class Kept(nnx.Variable):
    """A variable that no gradient changes, and that has no moments."""


class Mask(Kept):
    """Numbers from 0 to 1, float32, that rise once per applied update (:func:`risen`)."""


def full(*shape: int) -> Mask:
    """A mask of parts that are all there."""
    return Mask(jnp.ones(shape, jnp.float32))


def risen(mask: Float[Array, "..."], steps: int) -> Float[Array, "..."]:
    """A mask after one more update: it goes from 0 to exactly 1 in so many.

    Sums of ``1 / steps`` would round; the number of updates is a whole one.
    """
    return jnp.minimum((jnp.round(mask * steps) + 1) / steps, 1.0)


def with_risen_masks(variables: nnx.State, steps: int) -> nnx.State:
    """The variables of a decoder with all masks after one more update."""

    def rise(variable: Any) -> Any:
        if not isinstance(variable, Mask):
            return variable
        return variable.replace(risen(variable.get_value(), steps))

    return jax.tree.map(rise, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


class MaskedRMSNorm(nnx.RMSNorm):
    """RMSNorm over the units that are there: ``x / sqrt(sum(m x²) / sum(m))``, times m."""

    def __init__(self, width: int, **settings: Any):
        super().__init__(width, **settings)
        self.mask_D = full(width)

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The masked norm; statistics in float32."""
        mask_D = whole_mask("mask_D", self.mask_D)
        wide_BLD = x_BLD.astype(jnp.float32)
        factor_BL1 = jax.lax.rsqrt(masked_mean(jnp.square(wide_BLD), mask_D) + self.epsilon)
        return (wide_BLD * factor_BL1 * (self.scale[...] * mask_D)).astype(self.dtype)


def is_masked(norm: nnx.RMSNorm) -> bool:
    """Whether a norm has a mask, of which no kernel knows."""
    return isinstance(norm, MaskedRMSNorm)


def on_stream(norm: nnx.RMSNorm, y_BLD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """A vector that is to be added to the stream, times the mask of the width, which every norm
    has."""
    if not is_masked(norm):
        return y_BLD
    return y_BLD * whole_mask("mask_D", norm.mask_D).astype(y_BLD.dtype)


def masked_mean(x_BLX: Float[Array, "B L X"], mask_X: Float[Array, "X"]) -> Float[Array, "B L 1"]:
    """Mean over the last axis of what is there."""
    return jnp.sum(x_BLX * mask_X, axis=-1, keepdims=True) / jnp.sum(mask_X)


def whole_mask(name: str, mask: Mask) -> Float[Array, "X"]:
    """The numbers of a mask, put together on every device."""
    return whole_parameter(name, mask[...], jnp.float32)


def masked_rows(name: str, array: Float[Array, "... F D"], mask_F: Mask) -> Float[Array, "... F D"]:
    """The matrix behind hidden units, each row times its unit's mask; any other array as it is."""
    if not reads_hidden(name):
        return array
    return array * mask_F[...].astype(array.dtype)[:, None]


def reads_hidden(name: str) -> bool:
    """Whether an array is a matrix from hidden units to the stream, by its name."""
    return axes_of(name)[-2:] == ["F", "D"]


def of_key_heads(mask_H: Float[Array, "H"], key_heads: int) -> Float[Array, "G"]:
    """Masks of key/value heads: a group is there with the first of its query heads."""
    return jnp.max(mask_H.reshape(key_heads, -1), axis=-1)


def between(
    mask: Float[Array, ""], new: Float[Array, "..."], old: Float[Array, "..."]
) -> Float[Array, "..."]:
    """``m new + (1 - m) old``, in the type of both."""
    mask = mask.astype(old.dtype)
    return mask * new + (1 - mask) * old
