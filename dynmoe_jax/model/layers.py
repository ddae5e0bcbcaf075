"""Small parts that every layer uses: initial matrices, norms, rotary positions.

Axis legend: B batch, L positions, H heads, W width of a head, X = H W heads side by side, D model
width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.target import current_target


def compute_dtype(model: config.Model) -> jnp.dtype:
    """The type that ``config.model.dtype`` names; ``auto`` is float32 on CPU, else bfloat16."""
    if model.dtype != "auto":
        return jnp.dtype(model.dtype)
    return jnp.dtype("float32" if current_target().platform == "cpu" else "bfloat16")


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def rms_norm(model: config.Model, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over D (arXiv 1910.07467); statistics in float32, output in the compute type."""
    return nnx.RMSNorm(
        model.width, epsilon=model.norm_epsilon, dtype=compute_dtype(model), rngs=rngs
    )


def normalize_heads(
    x_BLX: Float[Array, "B L X"], scale_X: Float[Array, "X"], epsilon: float
) -> Float[Array, "B L X"]:
    """RMSNorm over all heads of a position together (OLMoE, arXiv 2409.02060), in float32."""
    wide_BLX = x_BLX.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide_BLX), axis=-1, keepdims=True)
    return (wide_BLX * jax.lax.rsqrt(mean_square + epsilon) * scale_X).astype(x_BLX.dtype)
