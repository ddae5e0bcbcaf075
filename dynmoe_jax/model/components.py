"""Small parts that every layer uses: initial matrices, norms, rotary positions.

Axis legend: B batch, L positions, H heads, W width of a head, X = H W heads side by side, D model
width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.model.kernels.norm.token_tiles import on_tokens, over_tiles, runs_on_tiles
from dynmoe_jax.model.masks import Kept, MaskedRMSNorm, masked_mean
from dynmoe_jax.routing import Parameter


def compute_dtype(model: config.Model) -> jnp.dtype:
    """The type that ``config.model.dtype`` names; ``auto`` is float32 on CPU, else bfloat16."""
    if model.dtype != "auto":
        return jnp.dtype(model.dtype)
    return jnp.dtype("float32" if current_target().platform == "cpu" else "bfloat16")


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RouterState(Kept):
    """A variable of a router that no gradient changes, such as a bias or a threshold."""


def drawn(rngs: nnx.Rngs, parameter: Parameter, std: float) -> nnx.Param:
    """A float32 parameter as its declaration says; ``std`` is that of the model's matrices."""
    if parameter.init == "normal":
        values = std * jax.random.normal(rngs.params(), parameter.shape, jnp.float32)
    elif parameter.init in ("zeros", "ones"):
        values = getattr(jnp, parameter.init)(parameter.shape, jnp.float32)
    else:
        values = parameter.init(rngs.params(), parameter.shape)
    return nnx.Param(values) if parameter.decay else nnx.Param(values, decay=False)


def rms_norm(model: config.Model, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over D (arXiv 1910.07467), with a mask where the model has them; statistics in
    float32, output in the compute type."""
    kind = MaskedRMSNorm if model.mask_steps else nnx.RMSNorm
    return kind(model.width, epsilon=model.norm_epsilon, dtype=compute_dtype(model), rngs=rngs)


def normalize_heads(
    x_BLX: Float[Array, "B L X"],
    scale_X: Float[Array, "X"],
    epsilon: float,
    mask_X: Float[Array, "X"] | None = None,
) -> Float[Array, "B L X"]:
    """RMSNorm over all heads of a position together (OLMoE, arXiv 2409.02060), in float32; with a
    mask, over those that are there."""
    wide_BLX = x_BLX.astype(jnp.float32)
    if mask_X is None:
        mean_square = jnp.mean(jnp.square(wide_BLX), axis=-1, keepdims=True)
    else:
        mean_square = masked_mean(jnp.square(wide_BLX), mask_X)
    return (wide_BLX * jax.lax.rsqrt(mean_square + epsilon) * scale_X).astype(x_BLX.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def added(
    x_TD: Float[Array, "T D"], y_TD: Float[Array, "T D"], plain: bool = False
) -> Float[Array, "T D"]:
    """x + y, computed in float32 and rounded once.

    By a kernel where one can run, unless it shall be ``plain``: of a sum of bfloat16 that it fuses
    with nothing, XLA makes a poor plan (docs/measurements.md: v6e-bare-sum).
    """
    if plain or not runs_on_tiles(x_TD):
        return (x_TD.astype(jnp.float32) + y_TD.astype(jnp.float32)).astype(x_TD.dtype)

    def of_tile(x_ref, y_ref, sum_ref):
        sum_TD = x_ref[...].astype(jnp.float32) + y_ref[...].astype(jnp.float32)
        sum_ref[...] = sum_TD.astype(sum_ref.dtype)

    def of_tokens(x_TD, y_TD):
        return over_tiles("added", of_tile, [x_TD, y_TD], [])[0]

    return on_tokens(of_tokens, 2, 0)(x_TD, y_TD)


# Of its own, or the gradient would be cast to float32 and back, in passes of their own.
added.defvjp(
    lambda x, y, plain: (added(x, y, plain), None), lambda plain, _, gradient: (gradient, gradient)
)
