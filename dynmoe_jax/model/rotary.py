"""Rotary positions (arXiv 2104.09864), halves rotated as in Llama.

Component i of a head is paired with component i + W/2 and rotated by ``position * theta^(-2i/W)``.
All layers rotate by the same angles, so they are worked out once for a batch.

Axis legend: B batch, L positions, H heads, W head width, R lanes of the table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dynmoe_jax.hardware.target import TPU_LANES, current_target
from dynmoe_jax.mesh.axes import on_one_device


def rotary_table(
    positions_BL: Int[Array, "B L"], width: int, theta: float
) -> Float[Array, "B L R"]:
    """Cosines in the first half of the lanes, sines in the second, float32.

    A half has an angle for each pair of components, R = W; on TPU those of narrow heads are there
    again for each head that shares the lanes of a register
    (:mod:`.kernels.attention.flat_kernels`).

    Args:
      positions_BL: within the documents.
      width: W.
      theta: of the rotary positions.
    """
    half = width // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if current_target().platform == "tpu" and TPU_LANES % width == 0:
        frequency = jnp.tile(frequency, TPU_LANES // width)
    angle = positions_BL[..., None].astype(jnp.float32) * frequency
    table = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    # Otherwise XLA works the table out again in whatever reads it, for each head of each layer that
    # is not in a loop.  On a mesh layers are, and with the barrier eight simulated CPU devices
    # started collectives in unlike orders and waited for each other for ever, in most runs.
    return jax.lax.optimization_barrier(table) if on_one_device() else table


def rotate(
    x_BLHW: Float[Array, "B L H W"], rotary_BLR: Float[Array, "B L R"]
) -> Float[Array, "B L H W"]:
    """Queries or keys, rotated."""
    half = x_BLHW.shape[-1] // 2
    cos, sin = (table[:, :, None, :half] for table in jnp.split(rotary_BLR, 2, axis=-1))
    first, second = jnp.split(x_BLHW.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLHW.dtype)
