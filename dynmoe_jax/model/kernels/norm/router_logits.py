"""Fork in the residual stream before experts: the stream, its RMSNorm, and the router's logits.

On TPU the norm is a kernel each way (:mod:`.norm`), and the one of backward adds what the logits
tell the normed stream: a product with the router, of E columns.  By XLA that sum is a pass of its
own over [T, D] (docs/measurements.md: v6e-router-gradient).

Axis legend: B batch, L positions, T = B L tokens, D model width, E experts, S summands of a
product that stands for one of float32, t tokens of a tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dynmoe_jax.mesh.collectives import COMPUTED_AGAIN
from dynmoe_jax.model.kernels.norm.norm import (
    as_row,
    forked,
    gradients_of_rows,
    norm_of_tokens,
    unit_rows,
)
from dynmoe_jax.model.kernels.norm.token_tiles import on_tokens, over_tiles, runs_on_tiles
from dynmoe_jax.model.masks import is_masked

Forked = tuple[Float[Array, "B L D"], Float[Array, "B L D"], Float[Array, "B L E"]]


def norm_and_logits(
    norm: nnx.RMSNorm,
    x_BLD: Float[Array, "B L D"],
    router_DE: Float[Array, "D E"],
    plain: bool = False,
) -> Forked:
    """(the stream, its norm, the router's logits, float32).

    By kernels where they can run
    (:func:`~dynmoe_jax.model.kernels.norm.token_tiles.runs_on_tiles`).

    Args:
      norm: RMSNorm.
      x_BLD: the stream, in the compute type.
      router_DE: float32.
      plain: no kernels.
    """
    if plain or is_masked(norm) or not runs_on_tiles(x_BLD):
        x_BLD, normed_BLD = forked(norm, x_BLD, plain)
        return x_BLD, normed_BLD, logits_of(normed_BLD, router_DE)
    scale_D = norm.scale[...].astype(norm.dtype)
    x_BLD, normed_BLD, logits_BLE = logits_by_kernels(x_BLD, scale_D, router_DE, norm.epsilon)
    # Named, so that logits are kept, though the norm is not.
    return x_BLD, normed_BLD, checkpoint_name(logits_BLE, "logits")


def logits_of(
    normed_BLD: Float[Array, "*T D"], router_DE: Float[Array, "D E"]
) -> Float[Array, "*T E"]:
    """The router's logits of tokens, by XLA."""
    # At full precision: accelerators multiply float32 in bfloat16 or TF32 by default.
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(normed_BLD.astype(jnp.float32), router_DE, precision=exact)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def logits_by_kernels(
    x_BLD: Float[Array, "B L D"],
    scale_D: Float[Array, "D"],
    router_DE: Float[Array, "D E"],
    epsilon: float,
    interpret: bool = False,
) -> Forked:
    """:func:`norm_and_logits`, with the kernels; ``interpret`` runs them on a CPU, for tests."""
    normed_BLD = on_tokens(partial(norm_of_tokens, epsilon, interpret), 1)(x_BLD, scale_D)
    normed_BLD = checkpoint_name(normed_BLD, COMPUTED_AGAIN)
    return x_BLD, normed_BLD, logits_of(normed_BLD, router_DE)


def _forward(x_BLD, scale_D, router_DE, epsilon, interpret):
    results = logits_by_kernels(x_BLD, scale_D, router_DE, epsilon, interpret)
    return results, (x_BLD, scale_D, router_DE, results[1])


def _backward(epsilon, interpret, residuals, gradients):
    x_BLD, scale_D, router_DE, normed_BLD = residuals
    dstream_BLD, dnormed_BLD, dlogits_BLE = gradients
    dlogits_BLS, router_DS = summands(dlogits_BLE, router_DE, x_BLD.dtype)
    run = on_tokens(partial(_backward_of_tokens, epsilon, interpret), 4, 2)
    dx_BLD, dscale_ND = run(x_BLD, dstream_BLD, dnormed_BLD, dlogits_BLS, scale_D, router_DS)
    drouter_DE = jnp.einsum(
        "bld,ble->de",
        normed_BLD.astype(jnp.float32),
        dlogits_BLE,
        precision=jax.lax.Precision.HIGHEST,
    )
    return dx_BLD, jnp.sum(dscale_ND, axis=0).astype(scale_D.dtype), drouter_DE


logits_by_kernels.defvjp(_forward, _backward)


def summands(
    left_BLE: Float[Array, "B L E"], right_DE: Float[Array, "D E"], dtype: jnp.dtype
) -> tuple[Float[Array, "B L S"], Float[Array, "D S"]]:
    """Factors in the compute type whose product is that of two in float32.

    A number in float32 is the sum of three in bfloat16.  Of the nine products of two such, six are
    above the rounding of float32; side by side along the contracted axis, they are one product, as
    E is far below the width of a matrix unit.

    Args:
      left_BLE: float32.
      right_DE: float32.
      dtype: the compute type; nothing is cut in float32.
    """
    if dtype == jnp.float32:
        return left_BLE, right_DE
    left, right = _three(left_BLE, dtype), _three(right_DE, dtype)
    pairs = [(i, j) for i in range(3) for j in range(3) if i + j < 3]
    return (
        jnp.concatenate([left[i] for i, _ in pairs], axis=-1),
        jnp.concatenate([right[j] for _, j in pairs], axis=-1),
    )


def _three(x, dtype):
    """Three summands of numbers in float32, the largest first."""
    bits = jnp.finfo(dtype)
    parts = []
    for _ in range(3):
        # Not a cast there and back, which a compiler may leave out.
        part = jax.lax.reduce_precision(x, bits.nexp, bits.nmant)
        parts.append(part.astype(dtype))
        x = x - part
    return parts


def _backward_of_tokens(
    epsilon, interpret, x_BLD, dstream_BLD, dnormed_BLD, dlogits_BLS, scale_D, router_DS
):
    """(gradient of the stream, gradient of the scale of each tile)."""
    exact = jax.lax.Precision.HIGHEST if router_DS.dtype == jnp.float32 else None

    def of_tile(
        x_ref, dstream_ref, dnormed_ref, dlogits_ref, scale_ref, router_ref, dx_ref, dscale_ref
    ):
        unit_tD, factor_t1 = unit_rows(x_ref[...], epsilon)
        dnormed_tD = dnormed_ref[...].astype(jnp.float32) + jax.lax.dot_general(
            dlogits_ref[...],
            router_ref[...],
            (((1,), (1,)), ((), ())),
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        dx_tD, dscale_ref[0] = gradients_of_rows(
            unit_tD, factor_t1, dstream_ref[...], dnormed_tD, scale_ref[...]
        )
        dx_ref[...] = dx_tD.astype(dx_ref.dtype)

    arrays, whole = [x_BLD, dstream_BLD, dnormed_BLD, dlogits_BLS], [as_row(scale_D), router_DS]
    dx_TD, dscale_N1D = over_tiles(
        "routed_norm_backward", of_tile, arrays, whole, interpret, sums=True
    )
    return dx_TD.reshape(x_BLD.shape), dscale_N1D[:, 0]
