"""Fork in the residual stream before attention, and the products of its RMSNorm.

On TPU, one kernel for each direction, if the matrices fit into VMEM: a tile of the stream is
there once, for the norm, all products and, in backward, all gradients.  By XLA backward takes a
pass for every product, for their sum, and for the norm.  Where D is small, such passes are what
a layer's time goes into.

Axis legend: B batch, L positions, T = B L tokens, D model width, X columns of a matrix, N tiles of
tokens, C parts of the tiles, t tokens of a tile.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.hardware.target import TPU_LANES, current_target
from dynmoe_jax.hardware.tiles import cheapest_tile
from dynmoe_jax.hardware.vmem import kernel_limit, tile_budget, vmem_bytes
from dynmoe_jax.mesh.axes import (
    BATCH,
    MODEL,
    batch_devices,
    mesh_sizes,
    on_one_device,
    parameter_spec,
)
from dynmoe_jax.mesh.collectives import COMPUTED_AGAIN, each_device, gathered
from dynmoe_jax.mesh.sharding import whole_parameter
from dynmoe_jax.model.kernels.norm.norm import forked, gradients_of_rows, unit_rows
from dynmoe_jax.model.linear.products import times
from dynmoe_jax.model.masks import is_masked

TILES = (512, 256, 128)
"""Tokens of a tile, best first: backward adds to the gradients of all matrices once for each."""

PARTS = 2
"""Parts of the tiles, for the two cores of a v4 or v5p; each adds up gradients of its own."""


def projected(
    norm: nnx.RMSNorm,
    x_BLD: Float[Array, "B L D"],
    matrices: Mapping[str, Array],
    plain: bool = False,
) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L X"], ...]]:
    """(the stream, the product of its norm with each matrix).

    Args:
      norm: RMSNorm.
      x_BLD: the stream, in the compute type.
      matrices: by the name of the parameter, [D, ...]; axes behind D are put side by side.
      plain: no kernels.
    """
    width, sizes = x_BLD.shape[-1], mesh_sizes()
    columns = [matrix.size // width for matrix in matrices.values()]
    tokens = x_BLD.size // width // batch_devices(sizes)
    tile = 0 if plain or is_masked(norm) else projection_tile(tokens, width, columns, x_BLD.dtype)
    if sizes[MODEL] > 1 or not tile:
        x_BLD, normed_BLD = forked(norm, x_BLD, plain)
        return x_BLD, tuple(
            times(normed_BLD, whole_parameter(name, matrix, x_BLD.dtype, (width, -1)), plain)
            for name, matrix in matrices.items()
        )
    # The cast comes first, so that bfloat16 travels.
    flat = tuple(m.astype(x_BLD.dtype).reshape(width, -1) for m in matrices.values())
    run = partial(_on_each_device, tile, norm.epsilon)
    scale_D = norm.scale[...].astype(norm.dtype)
    if on_one_device():
        return run(None, x_BLD, scale_D, flat)
    specs = tuple(P(parameter_spec(name, m.shape, sizes)[0]) for name, m in matrices.items())
    run = each_device(partial(run, specs), (P(BATCH), P(), specs), P(BATCH))
    return run(x_BLD, scale_D, flat)


def projection_tile(tokens: int, width: int, columns: Sequence[int], dtype: jnp.dtype) -> int:
    """Tokens of a tile on the current target; 0 if it is no TPU, or nothing fits.

    Args:
      tokens: T of one device.
      width: D.
      columns: X of each matrix.
      dtype: the compute type.
    """
    target = current_target()
    if target.platform != "tpu" or any(size % TPU_LANES for size in (width, *columns)):
        return 0
    divide = ((tile,) for tile in TILES if tokens % tile == 0)
    held_bytes = partial(_vmem_of_backward, width, sum(columns), dtype)
    (tile,) = cheapest_tile(divide, held_bytes, tile_budget(vmem_bytes(target))) or (0,)
    return tile


def _vmem_of_backward(width: int, columns: int, dtype: jnp.dtype, tile: int) -> int:
    """Bytes that backward uses; forward uses less."""
    wide = jnp.dtype(dtype).itemsize
    # Matrices, and their gradients in float32; tiles of two programs; five tiles of arithmetic.
    kept = (wide + 4) * width * columns
    return kept + 2 * wide * tile * (3 * width + columns) + 5 * 4 * tile * width


def _on_each_device(tile: int, epsilon: float, specs, x_BLD, scale_D, parts):
    if specs:
        parts = tuple(gathered(part, spec) for part, spec in zip(parts, specs, strict=True))
    return projected_by_kernels(x_BLD, scale_D, parts, tile, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def projected_by_kernels(
    x_BLD: Float[Array, "B L D"],
    scale_D: Float[Array, "D"],
    matrices: tuple[Float[Array, "D X"], ...],
    tile: int,
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B L D"], tuple[Float[Array, "B L X"], ...]]:
    """:func:`projected` of the tokens of one device.

    Args:
      x_BLD: the stream.
      scale_D: of the norm.
      matrices: in the type of the stream.
      tile: tokens of a tile; divides T.
      epsilon: of the norm.
      interpret: runs the kernels on a CPU, for tests.
    """
    products = _projection_forward(x_BLD, scale_D, matrices, tile, epsilon, interpret)
    # From the stream, which is kept, they are made again in less time than it takes to keep them
    # (docs/measurements.md: v6e-projections-again).
    return x_BLD, checkpoint_name(products, COMPUTED_AGAIN)


def _project_forward(x_BLD, scale_D, matrices, tile, epsilon, interpret):
    results = projected_by_kernels(x_BLD, scale_D, matrices, tile, epsilon, interpret)
    return results, (x_BLD, scale_D, matrices)


def _project_backward(tile, epsilon, interpret, residuals, gradients):
    x_BLD, scale_D, matrices = residuals
    dstream_BLD, dproducts = gradients
    dx_BLD, dscale_CD, dmatrices = _projection_backward(
        x_BLD, dstream_BLD, dproducts, scale_D, matrices, tile, epsilon, interpret
    )
    dmatrices = tuple(jnp.sum(d_CDX, axis=0).astype(x_BLD.dtype) for d_CDX in dmatrices)
    return dx_BLD, jnp.sum(dscale_CD, axis=0).astype(scale_D.dtype), dmatrices


projected_by_kernels.defvjp(_project_forward, _project_backward)


def _projection_forward(x_BLD, scale_D, matrices, tile, epsilon, interpret):
    def of_tile(x_ref, scale_ref, *refs):
        unit_tD, _ = unit_rows(x_ref[...], epsilon)
        normed_tD = (unit_tD * scale_ref[...]).astype(x_ref.dtype)
        for matrix, product in zip(refs[: len(matrices)], refs[len(matrices) :], strict=True):
            product[...] = _product(normed_tD, matrix[...], 1, 0).astype(product.dtype)

    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    tokens, width = x_TD.shape
    outputs = [jax.ShapeDtypeStruct((tokens, m.shape[1]), x_TD.dtype) for m in matrices]
    products = pl.pallas_call(
        of_tile,
        grid=(tokens // tile,),
        in_specs=[_rows(tile, width), *_whole(width, matrices)],
        out_specs=[_rows(tile, m.shape[1]) for m in matrices],
        out_shape=outputs,
        compiler_params=_parameters(("parallel",)),
        cost_estimate=_cost(1, tokens, matrices, [x_TD, *matrices, *outputs]),
        name="projection_forward",
        interpret=interpret,
    )(x_TD, _row(scale_D), *matrices)
    return tuple(p.reshape(*x_BLD.shape[:2], -1) for p in products)


def _projection_backward(
    x_BLD, dstream_BLD, dproducts, scale_D, matrices, tile, epsilon, interpret
):
    """Gradients of the stream, and of scale and matrices for each part of the tiles."""
    arrays = [a.reshape(-1, a.shape[-1]) for a in (x_BLD, dstream_BLD, *dproducts)]
    tokens, width = arrays[0].shape
    parts = PARTS if tokens // tile % PARTS == 0 else 1
    each = tokens // tile // parts
    several = len(matrices)
    sums = [jax.ShapeDtypeStruct((parts, *m.shape), jnp.float32) for m in matrices]
    outputs = [
        jax.ShapeDtypeStruct((tokens, width), x_BLD.dtype),
        jax.ShapeDtypeStruct((parts, 1, width), jnp.float32),
        *sums,
    ]

    def of_tile(x_ref, dstream_ref, *refs):
        dproduct_refs, (scale_ref, *matrix_refs) = refs[:several], refs[several : 2 * several + 1]
        dx_ref, dscale_ref, *dmatrix_refs = refs[2 * several + 1 : 3 * several + 3]
        sum_refs, part, i = refs[3 * several + 3 :], pl.program_id(0), pl.program_id(1)

        @pl.when(i == 0)
        def _():
            for ref in (dscale_ref, *sum_refs):
                ref[...] = jnp.zeros_like(ref)

        unit_tD, factor_t1 = unit_rows(x_ref[...], epsilon)
        normed_Dt = (unit_tD * scale_ref[...]).T.astype(x_ref.dtype)
        dnormed_tD = jnp.zeros_like(unit_tD)
        for dproduct, matrix, total in zip(dproduct_refs, matrix_refs, sum_refs, strict=True):
            dnormed_tD += _product(dproduct[...], matrix[...], 1, 1)
            total[...] += _product(normed_Dt, dproduct[...], 1, 0)
        dx_tD, dscale_1D = gradients_of_rows(
            unit_tD, factor_t1, dstream_ref[...], dnormed_tD, scale_ref[...]
        )
        dx_ref[...] = dx_tD.astype(dx_ref.dtype)
        dscale_ref[0] += dscale_1D

        @pl.when(i == each - 1)
        def _():
            for total, out in zip(sum_refs, dmatrix_refs, strict=True):
                pltpu.sync_copy(total, out.at[part])

    def rows(columns):
        return pl.BlockSpec((tile, columns), lambda part, i: (part * each + i, 0))

    dx_TD, dscale_C1D, *dmatrices = pl.pallas_call(
        of_tile,
        grid=(parts, each),
        in_specs=[*(rows(a.shape[1]) for a in arrays), *_whole(width, matrices)],
        out_specs=[
            rows(width),
            pl.BlockSpec((1, 1, width), lambda part, i: (part, 0, 0)),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in matrices),
        ],
        out_shape=outputs,
        scratch_shapes=[pltpu.VMEM(m.shape, jnp.float32) for m in matrices],
        compiler_params=_parameters(("parallel", "arbitrary")),
        cost_estimate=_cost(2, tokens, matrices, [*arrays, *matrices, *outputs]),
        name="projection_backward",
        interpret=interpret,
    )(*arrays, _row(scale_D), *matrices)
    return dx_TD.reshape(x_BLD.shape), dscale_C1D[:, 0], dmatrices


def _row(scale_D):
    return scale_D.astype(jnp.float32)[None]


def _rows(tile: int, columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((tile, columns), lambda i: (i, 0))


def _whole(width: int, matrices) -> list[pl.BlockSpec]:
    """Scale and matrices: fetched once, so there is no second buffer."""
    shapes = [(1, width), *(matrix.shape for matrix in matrices)]
    return [
        pl.BlockSpec(shape, lambda *_: (0, 0), pipeline_mode=pl.Buffered(1)) for shape in shapes
    ]


def _parameters(semantics: tuple[str, ...]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=kernel_limit(vmem_bytes(current_target())),
    )


def _cost(passes: int, tokens: int, matrices, arrays) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * passes * tokens * sum(matrix.size for matrix in matrices),
        transcendentals=tokens,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays),
    )


def _product(left, right, left_axis: int, right_axis: int):
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, contracted, precision=exact, preferred_element_type=jnp.float32
    )
