"""Grouped products by tokamax, the library that JAX's kernels for GPU move to.

Axis legend: R rows, E experts, I and O the inner and outer width of a matrix.
"""

import functools

from dynmoe_jax.experts.grouped_products import GroupedProducts, products_of

IMPLEMENTATIONS = {"gpu": ("triton", "mosaic"), "tpu": ("mosaic",)}
"""Not tokamax's own order, which ends in ``xla`` and so, on a GPU, in dense products.  Triton comes
first because it is this kernel that was measured on an H100 (78% of peak forward, XLA's dense
lowering 15%: marin-community/marin#4297), and because Blackwell has no Mosaic weight gradient."""


@functools.cache
def tokamax_products(platform: str) -> GroupedProducts:
    """The products for ``"gpu"`` or ``"tpu"``.

    Raises:
      ImportError: tokamax is not installed.
    """
    import tokamax

    ragged_dot_general = functools.partial(
        tokamax.ragged_dot_general, implementation=IMPLEMENTATIONS[platform]
    )
    return products_of("tokamax", ragged_dot_general, row_multiple=128)
