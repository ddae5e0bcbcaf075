"""Fork in the residual stream before a half of a layer: the stream, and its RMSNorm.

On TPU two kernels compute them in one pass each: rows of the stream, and both gradients, are in
VMEM once.  XLA takes two passes for backward, one for the sums over D and one that uses
them (docs/measurements.md: v5p-norm-kernels).

Axis legend: B batch, L positions, T = B L tokens, D model width, N tiles of tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dynmoe_jax.mesh.collectives import COMPUTED_AGAIN
from dynmoe_jax.model.kernels.norm.token_tiles import on_tokens, over_tiles, runs_on_tiles
from dynmoe_jax.model.masks import is_masked


def forked(
    norm: nnx.RMSNorm, x_BLD: Float[Array, "B L D"], plain: bool = False
) -> tuple[Array, Array]:
    """(the stream, its norm), by the kernels where they can run unless it shall be ``plain``; a
    masked norm by none."""
    if plain or is_masked(norm) or not runs_on_tiles(x_BLD):
        return x_BLD, norm(x_BLD)
    return forked_by_kernels(x_BLD, norm.scale[...].astype(norm.dtype), norm.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def forked_by_kernels(
    x_BLD: Float[Array, "B L D"],
    scale_D: Float[Array, "D"],
    epsilon: float,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """:func:`forked`, with the kernels; ``interpret`` runs them on a CPU, for tests."""
    run = on_tokens(partial(norm_of_tokens, epsilon, interpret), 1)
    return x_BLD, checkpoint_name(run(x_BLD, scale_D), COMPUTED_AGAIN)


def _fork_forward(x_BLD, scale_D, epsilon, interpret):
    return forked_by_kernels(x_BLD, scale_D, epsilon, interpret), (x_BLD, scale_D)


def _fork_backward(epsilon, interpret, residuals, gradients):
    x_BLD, scale_D = residuals
    run = on_tokens(partial(_norm_backward_of_tokens, epsilon, interpret), 3)
    dx_BLD, dscale_ND = run(x_BLD, *gradients, scale_D)
    return dx_BLD, jnp.sum(dscale_ND, axis=0).astype(scale_D.dtype)


forked_by_kernels.defvjp(_fork_forward, _fork_backward)


def norm_of_tokens(
    epsilon: float, interpret: bool, x_BLD: Float[Array, "B L D"], scale_D: Float[Array, "D"]
) -> Float[Array, "B L D"]:
    """RMSNorm by a kernel, on the tokens of one device."""

    def of_tile(x_ref, scale_ref, normed_ref):
        unit_TD, _ = unit_rows(x_ref[...], epsilon)
        normed_ref[...] = (unit_TD * scale_ref[...]).astype(normed_ref.dtype)

    (normed_TD,) = over_tiles("norm_forward", of_tile, [x_BLD], [as_row(scale_D)], interpret)
    return normed_TD.reshape(x_BLD.shape)


def _norm_backward_of_tokens(epsilon, interpret, x_BLD, dstream_BLD, dnormed_BLD, scale_D):
    """(gradient of the stream, gradient of the scale of each tile)."""

    def of_tile(x_ref, dstream_ref, dnormed_ref, scale_ref, dx_ref, dscale_ref):
        unit_TD, factor_T1 = unit_rows(x_ref[...], epsilon)
        dx_TD, dscale_ref[0] = gradients_of_rows(
            unit_TD, factor_T1, dstream_ref[...], dnormed_ref[...], scale_ref[...]
        )
        dx_ref[...] = dx_TD.astype(dx_ref.dtype)

    arrays = [x_BLD, dstream_BLD, dnormed_BLD]
    dx_TD, dscale_N1D = over_tiles(
        "norm_backward", of_tile, arrays, [as_row(scale_D)], interpret, sums=True
    )
    return dx_TD.reshape(x_BLD.shape), dscale_N1D[:, 0]


def as_row(scale_D: Float[Array, "D"]) -> Float[Array, "1 D"]:
    """Reshapes a vector to one row, in float32, as kernels take it."""
    return scale_D.astype(jnp.float32)[None]


def unit_rows(x_TD: Float[Array, "T D"], epsilon: float) -> tuple[Array, Array]:
    """Rows of mean square one, and what they were multiplied by, in float32."""
    x_TD = x_TD.astype(jnp.float32)
    factor_T1 = jax.lax.rsqrt(jnp.mean(jnp.square(x_TD), axis=-1, keepdims=True) + epsilon)
    return x_TD * factor_T1, factor_T1


def gradients_of_rows(
    unit_TD: Float[Array, "T D"],
    factor_T1: Float[Array, "T 1"],
    dstream_TD: Float[Array, "T D"],
    dnormed_TD: Float[Array, "T D"],
    scale_1D: Float[Array, "1 D"],
) -> tuple[Float[Array, "T D"], Float[Array, "1 D"]]:
    """Gradients of what was forked, and of the scale, in float32.

    Args:
      unit_TD: from :func:`unit_rows`.
      factor_T1: from :func:`unit_rows`.
      dstream_TD: gradient of the stream that went on.
      dnormed_TD: gradient of its norm.
      scale_1D: of the norm.
    """
    dnormed_TD = dnormed_TD.astype(jnp.float32)
    dunit_TD = dnormed_TD * scale_1D
    along_T1 = jnp.mean(dunit_TD * unit_TD, axis=-1, keepdims=True)
    dx_TD = dstream_TD.astype(jnp.float32) + factor_T1 * (dunit_TD - unit_TD * along_T1)
    return dx_TD, jnp.sum(dnormed_TD * unit_TD, axis=0, keepdims=True)
