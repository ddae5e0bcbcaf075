"""Grouped matmul by tokamax, the library that JAX's kernels for GPU move to.

Axis legend: R rows, E experts, I and O the inner and outer width of a matrix.
"""

import functools

from absl import flags

from dynmoe_jax.experts.kernels.contract import GroupedProducts, products_of

IMPLEMENTATIONS = {"gpu": ("triton", "mosaic"), "tpu": ("mosaic",)}
"""Implementations to try, in order.  Not tokamax's own order, which ends in ``xla`` and so, on a
GPU, in dense products.  Triton comes first because it is this kernel that others measured
(docs/measurements.md: h100-tokamax), and because Blackwell has no Mosaic weight gradient."""


def load_tokamax():
    """Imports tokamax, and keeps it from parsing the command line, whose flags it does not know."""
    import tokamax

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return tokamax


@functools.cache
def tokamax_products(platform: str) -> GroupedProducts:
    """Grouped matmuls by tokamax for ``"gpu"`` or ``"tpu"``.

    Raises:
      ImportError: tokamax is not installed.
    """
    ragged_dot_general = functools.partial(
        load_tokamax().ragged_dot_general, implementation=IMPLEMENTATIONS[platform]
    )
    return products_of("tokamax", ragged_dot_general, row_multiple=128)
