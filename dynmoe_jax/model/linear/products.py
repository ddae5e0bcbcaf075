"""Products with dense matrices: XLA's, or kernels of our own on a CPU with a matrix unit.

XLA multiplies float32 by vectors on every CPU.  Where one has a matrix unit for bfloat16, the
kernels get the same accuracy from that in less time (`hardware/native/amx_product.h`).

Axis legend: X all leading axes of the left side together, D the axis summed over, Y columns; in
``times_parameter`` B batch, L positions, X what is summed over and D model width.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.hardware.native import library
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.mesh.axes import BATCH, MODEL, mesh_sizes, on_one_device, parameter_spec
from dynmoe_jax.mesh.collectives import each_device, gathered
from dynmoe_jax.mesh.sharding import whole_parameter

ROWS = 512
"""Least number of rows of the left side for the kernels.  Each side is copied first, so that fewer
rows are as fast by XLA (docs/measurements.md: cpu-dense-product)."""


def times(
    x_XD: Float[Array, "*X D"], matrix_DY: Float[Array, "D Y"], plain: bool = False
) -> Float[Array, "*X Y"]:
    """``x @ matrix``, by XLA where it shall be ``plain``."""
    rows = math.prod(x_XD.shape[:-1])
    if plain or not _by_kernels(rows, x_XD, matrix_DY):
        return x_XD @ matrix_DY
    y_XY = _times(x_XD.reshape(rows, -1), matrix_DY)
    return y_XY.reshape(*x_XD.shape[:-1], -1)


def times_parameter(
    x_BLX: Float[Array, "B L X"], name: str, parameter: Float[Array, "..."], plain: bool = False
) -> Float[Array, "B L D"]:
    """``x_BLX`` times a parameter, whose axes but the last are put side by side.

    Where heads are not split, every device puts the parameter together for its own product:
    asked for the pieces of the gradient, along a part of X, the partitioner adds all of it up on
    every device, and waits for that (compiled for v6e:8x8).

    Args:
      x_BLX: on a mesh split by batch, and by heads along ``model``.
      name: of the parameter; its letters say how it lies.
      parameter: its axes but the last have X elements together.
      plain: by XLA.
    """
    sizes, matrix = mesh_sizes(), (x_BLX.shape[-1], parameter.shape[-1])
    if on_one_device() or sizes[MODEL] > 1:
        return times(x_BLX, whole_parameter(name, parameter, x_BLX.dtype, matrix), plain)
    spec = parameter_spec(name, parameter.shape, sizes)

    def on_each_device(x_BLX, part):
        return x_BLX @ gathered(part, spec).reshape(matrix)

    product = each_device(on_each_device, (P(BATCH), spec), P(BATCH))
    return product(x_BLX, parameter.astype(x_BLX.dtype))


def contracted(
    left: Float[Array, "..."],
    right: Float[Array, "..."],
    left_axes: tuple[int, ...],
    right_axes: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
    plain: bool = False,
) -> Float[Array, "..."]:
    """The sum over some axes of products, added up in float32; it has no derivative.

    Args:
      left: of float32 or bfloat16.
      right: of the same type.
      left_axes: those that are summed over: all leading ones, or all trailing ones.
      right_axes: the same of the right side.
      dtype: of the result.
      plain: by XLA.

    Returns:
      The other axes of the left side, then those of the right one.
    """
    sizes = [
        [size for axis, size in enumerate(array.shape) if axis not in axes]
        for array, axes in ((left, left_axes), (right, right_axes))
    ]
    rows, columns = map(math.prod, sizes)
    if plain or not _by_kernels(rows, left, right):
        dimensions = ((left_axes, right_axes), ((), ()))
        return jax.lax.dot_general(left, right, dimensions, preferred_element_type=dtype)
    left_transposed, right_transposed = 0 in left_axes, 0 not in right_axes
    left = left.reshape((-1, rows) if left_transposed else (rows, -1))
    right = right.reshape((columns, -1) if right_transposed else (-1, columns))
    product = _product(left, right, left_transposed, right_transposed)
    return product.reshape(sizes[0] + sizes[1]).astype(dtype)


def _by_kernels(rows: int, left: Array, right: Array) -> bool:
    """Whether our kernels multiply these."""
    alone = current_target().platform == "cpu" and on_one_device()
    exact = left.dtype == right.dtype == jnp.float32
    return alone and exact and rows >= ROWS and library.has_matrix_unit()


@jax.custom_vjp
def _times(x_XD, matrix_DY):
    return _product(x_XD, matrix_DY)


def _forward(x_XD, matrix_DY):
    return _times(x_XD, matrix_DY), (x_XD, matrix_DY)


def _backward(residuals, dy_XY):
    x_XD, matrix_DY = residuals
    return contracted(dy_XY, matrix_DY, (1,), (1,)), contracted(x_XD, dy_XY, (0,), (0,))


_times.defvjp(_forward, _backward)


def _product(left, right, left_transposed: bool = False, right_transposed: bool = False):
    """The product of two matrices, of which each may be stored transposed."""
    shape = left.shape[left_transposed], right.shape[not right_transposed]
    call = jax.ffi.ffi_call("dynmoe_product", jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(left, right, a_turned=left_transposed, b_turned=right_transposed)
