"""The fork in the residual stream before a half of a layer: the stream, and its RMSNorm.

On TPU two kernels compute them in one pass each: rows of the stream, and both gradients, are in
fast memory once.  XLA takes two passes for backward, one for the sums over D and one that uses
them.  With the stream between the halves kept, and the kernels, a step of the paper's model on 64
v5p takes 497 ms instead of 514 by the planner's count (remat ``elementwise``).

Axis legend: B batch, L positions, T = B L tokens, D model width, N tiles of tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.axes import BATCH, batch_devices, mesh_sizes, on_one_device
from dynmoe_jax.collectives import COMPUTED_AGAIN, each_device
from dynmoe_jax.target import TPU_LANES, current_target

TILE_ELEMENTS = 2**18
"""Of one array in fast memory: 256 tokens of D = 1024; four arrays, twice, are 4 MB in bfloat16."""


def forked(norm: nnx.RMSNorm, x_BLD: Float[Array, "B L D"]) -> tuple[Array, Array]:
    """(the stream, its norm).

    By the kernels on TPU, if D is a multiple of 128 and tiles of tokens divide those of a device.
    """
    tokens = x_BLD.size // x_BLD.shape[-1] // batch_devices(mesh_sizes())
    if current_target().platform != "tpu" or not norm_tile(tokens, x_BLD.shape[-1]):
        return x_BLD, norm(x_BLD)
    return forked_by_kernels(x_BLD, norm.scale[...].astype(norm.dtype), norm.epsilon)


def norm_tile(tokens: int, width: int) -> int:
    """Tokens of a tile; 0 if there is none that fits."""
    tile = TILE_ELEMENTS // width // 16 * 16
    while tile and tokens % tile:
        tile -= 16
    return 0 if width % TPU_LANES else tile


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
    run = on_tokens(partial(_backward_of_tokens, epsilon, interpret), 3)
    dx_BLD, dscale_ND = run(x_BLD, *gradients, scale_D)
    return dx_BLD, jnp.sum(dscale_ND, axis=0).astype(scale_D.dtype)


forked_by_kernels.defvjp(_fork_forward, _fork_backward)


def on_tokens(run: Callable, arrays: int, whole: int = 1) -> Callable:
    """A function of arrays of tokens and of what is whole, on the tokens of each device."""
    if on_one_device():
        return run
    return each_device(run, (*(P(BATCH),) * arrays, *(P(),) * whole), P(BATCH))


def norm_of_tokens(
    epsilon: float, interpret: bool, x_BLD: Float[Array, "B L D"], scale_D: Float[Array, "D"]
) -> Float[Array, "B L D"]:
    """RMSNorm by a kernel, on the tokens of one device."""

    def of_tile(x_ref, scale_ref, normed_ref):
        unit_TD, _ = unit_rows(x_ref[...], epsilon)
        normed_ref[...] = (unit_TD * scale_ref[...]).astype(normed_ref.dtype)

    (normed_TD,) = over_tiles("norm_forward", of_tile, [x_BLD], [as_row(scale_D)], interpret)
    return normed_TD.reshape(x_BLD.shape)


def _backward_of_tokens(epsilon, interpret, x_BLD, dstream_BLD, dnormed_BLD, scale_D):
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
    """In float32, as kernels take it."""
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


def over_tiles(
    name: str,
    body: Callable,
    arrays: Sequence[Array],
    whole: Sequence[Array],
    interpret: bool,
    sums: bool = False,
) -> list[Array]:
    """Runs a body on tiles of tokens; it makes rows like those of the first array.

    Args:
      name: of the kernel.
      body: gets a tile of each array, what is whole, and what it makes.
      arrays: [..., width], of all tokens.
      whole: matrices that every tile needs.
      interpret: run it on a CPU, for tests.
      sums: it makes a row for each tile too, [N, 1, D], float32.
    """
    D, dtype = arrays[0].shape[-1], arrays[0].dtype
    arrays = [array.reshape(-1, array.shape[-1]) for array in arrays]
    T = arrays[0].shape[0]
    tile = norm_tile(T, D)

    def rows(width):
        return pl.BlockSpec((tile, width), lambda n: (n, 0))

    specs, shapes = [rows(D)], [jax.ShapeDtypeStruct((T, D), dtype)]
    if sums:
        specs.append(pl.BlockSpec((1, 1, D), lambda n: (n, 0, 0)))
        shapes.append(jax.ShapeDtypeStruct((T // tile, 1, D), jnp.float32))
    moved = sum(a.size * a.dtype.itemsize for a in (*arrays, *whole, shapes[0]))
    products = sum(2 * T * matrix.size for matrix in whole if matrix.shape[0] > 1)
    return pl.pallas_call(
        body,
        grid=(T // tile,),
        in_specs=[
            *(rows(array.shape[1]) for array in arrays),
            *(pl.BlockSpec(matrix.shape, lambda n: (0, 0)) for matrix in whole),
        ],
        out_specs=specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=4 * len(arrays) * T * D + products, transcendentals=T, bytes_accessed=moved
        ),
        name=name,
        interpret=interpret,
    )(*arrays, *whole)
