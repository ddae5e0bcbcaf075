"""Grouped matmul by the Megablox kernels that JAX ships for TPU.

``gmm`` visits the row tiles that groups reach into, and no others, so time follows the rows used;
``tgmm``, the weight gradient, visits every expert, so that one without rows gets zeros.  It is used
where there are no tiles for :mod:`.weight_gradient`, which does the same in less time.

Axis legend: R rows, E experts, I and O the inner and outer width of a matrix.
"""

import functools

import jax.numpy as jnp

from dynmoe_jax.experts.kernels.contract import GroupedProducts
from dynmoe_jax.experts.kernels.tpu.swiglu_tiling import swiglu_tiling
from dynmoe_jax.experts.kernels.tpu.tiling import ROW_MULTIPLE, gradient_tiling, product_tiling
from dynmoe_jax.experts.kernels.tpu.weight_gradient_tiling import weight_gradient_tiling


@functools.cache
def megablox_products(
    flops_per_byte: float, vmem_bytes: int, interpret: bool = False
) -> GroupedProducts:
    """Makes the grouped matmuls, with tiles for a chip, and the kernels that fuse SwiGLU with them.

    Args:
      flops_per_byte: peak rate of the chip over that of its memory.
      vmem_bytes: VMEM of one of its cores.
      interpret: run the kernels on a CPU, slowly, for tests.

    Raises:
      ImportError: this version of JAX does not ship the kernels.
    """
    # Not at the top: a CPU has no use for the TPU half of Pallas, which is slow to import
    # (docs/measurements.md: start-pallas-tpu).
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    def tiles(rows_RI, experts, inner, outer, of=product_tiling, **options):
        rows, itemsize = rows_RI.shape[0], rows_RI.dtype.itemsize
        return of(rows, experts, inner, outer, itemsize, flops_per_byte, **options)

    def forward(x_RI, w_EIO, group_size_E):
        experts, inner, outer = w_EIO.shape
        tiling = tiles(x_RI, experts, inner, outer)
        return gmm(x_RI, w_EIO, group_size_E, x_RI.dtype, tiling, interpret=interpret)

    def input_gradient(dy_RO, w_EIO, group_size_E):
        experts, inner, outer = w_EIO.shape
        # The widths change places: here O is what is summed over.
        tiling = tiles(dy_RO, experts, outer, inner, transposed=True)
        return gmm(
            dy_RO,
            w_EIO,
            group_size_E,
            dy_RO.dtype,
            tiling,
            transpose_rhs=True,
            interpret=interpret,
        )

    def gradient_of_weights(x_RI, dy_RO, group_size_E):
        inner, outer = x_RI.shape[1], dy_RO.shape[1]
        own = tiles(
            *(x_RI, group_size_E.shape[0], inner, outer),
            of=weight_gradient_tiling,
            vmem_bytes=vmem_bytes,
        )
        if own:
            from dynmoe_jax.experts.kernels.tpu.weight_gradient import weight_gradient

            return weight_gradient(own, x_RI, dy_RO, group_size_E, interpret)
        tiling = tiles(x_RI, group_size_E.shape[0], inner, outer, of=gradient_tiling)
        return tgmm(
            jnp.swapaxes(x_RI, 0, 1), dy_RO, group_size_E, x_RI.dtype, tiling, interpret=interpret
        )

    def swiglu(rows, dtype, weights):
        from dynmoe_jax.experts.kernels.tpu.swiglu import fused_swiglu

        experts, hidden_width, width = weights.down_EFD.shape
        itemsize = jnp.dtype(dtype).itemsize
        shape = rows, experts, width, hidden_width, itemsize
        tiling = swiglu_tiling(*shape, flops_per_byte, vmem_bytes)
        return fused_swiglu(tiling, interpret) if tiling else None

    def sums(y_RO, token_R, group_size_E, row_TK):
        from dynmoe_jax.experts.kernels.tpu.combine import sizes_for, sum_of_rows

        sizes = sizes_for(row_TK.shape[0], y_RO.shape[1], y_RO.dtype.itemsize)
        if sizes is None:
            return None
        return sum_of_rows(y_RO, token_R, group_size_E, row_TK, sizes, interpret=interpret)

    return GroupedProducts(
        "megablox",
        forward,
        input_gradient,
        gradient_of_weights,
        ROW_MULTIPLE,
        # Its schedule visits every group of the weight gradient, empty ones to write zeros.
        zeroes_empty=True,
        # Rows stay apart in the products of rows; the weight gradient selects those of a group.
        ignores_padding=True,
        swiglu=swiglu,
        sum_of_rows=sums,
    )
