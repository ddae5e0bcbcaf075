"""Products with dense matrices: XLA's, or kernels of our own on a CPU with a matrix unit.

XLA multiplies float32 by vectors on every CPU.  Where one has a matrix unit for bfloat16, the
kernels get the same accuracy from that in less time (`native/amx_product.h`).

Axis legend: X all leading axes of the left side together, D the axis summed over, Y columns.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.axes import on_one_device
from dynmoe_jax.native import library
from dynmoe_jax.target import current_target

ROWS = 512
"""Of the left side, at least, for the kernels.  Each side is copied first: a product of 128 rows is
as fast by XLA, of 512 to 4,096 rows it takes from as long to 1.5 times that, by what else runs on
the cores (Emerald Rapids, two cores, 512 to 8,192 columns)."""


def times(x_XD: Float[Array, "*X D"], matrix_DY: Float[Array, "D Y"]) -> Float[Array, "*X Y"]:
    """``x @ matrix``."""
    rows = math.prod(x_XD.shape[:-1])
    if not _by_kernels(rows, x_XD, matrix_DY):
        return x_XD @ matrix_DY
    y_XY = _times(x_XD.reshape(rows, -1), matrix_DY)
    return y_XY.reshape(*x_XD.shape[:-1], -1)


def contracted(
    left: Float[Array, "..."],
    right: Float[Array, "..."],
    left_axes: tuple[int, ...],
    right_axes: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "..."]:
    """The sum over some axes of products, added up in float32; it has no derivative.

    Args:
      left: of float32 or bfloat16.
      right: of the same type.
      left_axes: those that are summed over: all leading ones, or all trailing ones.
      right_axes: the same of the right side.
      dtype: of the result.

    Returns:
      The other axes of the left side, then those of the right one.
    """
    sizes = [
        [size for axis, size in enumerate(array.shape) if axis not in axes]
        for array, axes in ((left, left_axes), (right, right_axes))
    ]
    rows, columns = map(math.prod, sizes)
    if not _by_kernels(rows, left, right):
        dimensions = ((left_axes, right_axes), ((), ()))
        return jax.lax.dot_general(left, right, dimensions, preferred_element_type=dtype)
    left_turned, right_turned = 0 in left_axes, 0 not in right_axes
    left = left.reshape((-1, rows) if left_turned else (rows, -1))
    right = right.reshape((columns, -1) if right_turned else (-1, columns))
    product = _product(left, right, left_turned, right_turned)
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


def _product(left, right, left_turned: bool = False, right_turned: bool = False):
    """The product of two matrices, of which each may be stored turned."""
    shape = left.shape[left_turned], right.shape[not right_turned]
    call = jax.ffi.ffi_call("dynmoe_product", jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(left, right, a_turned=left_turned, b_turned=right_turned)
