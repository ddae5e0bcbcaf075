"""Products with the weights of one expert, and sums into them, inside a loop over experts.

Axis legend: E experts, b rows of one block, I and O the inner and outer width of a product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NARROW_ROWS = 16
PART_BYTES = 3 * 2**20
SMALLEST_PART = 16


def expert(array_EIO: Float[Array, "E I O"], e: Int[Array, ""]) -> Float[Array, "I O"]:
    """Slices out the matrix of one expert.  XLA copies it, once for all blocks of the expert."""
    return jax.lax.dynamic_index_in_dim(array_EIO, e, keepdims=False)


def times_expert(
    x_bI: Float[Array, "b I"], weight_EIO: Float[Array, "E I O"], e: Int[Array, ""]
) -> Float[Array, "b O"]:
    """``x_bI @ weight_EIO[e]``.

    A few rows cost no more than reading the weights, so there the copy that XLA makes of
    ``weight_EIO[e]`` counts: taken in parts that stay in the cache, the product is several times
    faster (docs/measurements.md: cpu-weight-parts).
    """
    rows, inner = x_bI.shape
    part = _part(inner, weight_EIO.shape[2] * weight_EIO.dtype.itemsize)
    if rows > NARROW_ROWS or part == inner:
        return x_bI @ expert(weight_EIO, e)

    def add_part(i, y_bO):
        x_bp = jax.lax.dynamic_slice(x_bI, (0, i * part), (rows, part))
        sizes = (1, part, weight_EIO.shape[2])
        weight_pO = jax.lax.dynamic_slice(weight_EIO, (e, i * part, 0), sizes)[0]
        return y_bO + jnp.dot(x_bp, weight_pO, preferred_element_type=jnp.float32)

    y_bO = jnp.zeros((rows, weight_EIO.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, inner // part, add_part, y_bO).astype(x_bI.dtype)


def _part(inner: int, row_bytes: int) -> int:
    """Most rows of a matrix that divide it and hold at most ``PART_BYTES``.

    Everything, if only slivers divide it.
    """
    most = min(inner, max(1, PART_BYTES // row_bytes))
    part = max(p for p in range(1, most + 1) if inner % p == 0)
    return part if part >= SMALLEST_PART else inner


def add_to_expert(
    array_EIO: Float[Array, "E I O"], e: Int[Array, ""], value_IO: Float[Array, "I O"]
) -> Float[Array, "E I O"]:
    """``array_EIO`` with ``value_IO`` added to one expert, in place inside a loop.

    As rows of a matrix that are scattered: XLA's CPU backend does that on all cores and without a
    copy of what it adds to, where it updates a slice on one core and copies it first
    (docs/measurements.md: cpu-scatter-add).
    """
    experts, inner, outer = array_EIO.shape
    row_I = e * inner + jnp.arange(inner)
    total_XO = array_EIO.reshape(experts * inner, outer)
    total_XO = total_XO.at[row_I].add(
        value_IO.astype(array_EIO.dtype),
        mode="promise_in_bounds",
        unique_indices=True,
        indices_are_sorted=True,
    )
    return total_XO.reshape(array_EIO.shape)


def gather(x_TD: Float[Array, "T D"], token_b: Int[Array, "b"]) -> Float[Array, "b D"]:
    """Gathers the rows of ``x_TD`` that ``token_b`` names; zeros for a token beyond the last."""
    return x_TD.at[token_b].get(mode="fill", fill_value=0)


def scatter_add(
    y_TD: Float[Array, "T D"], token_b: Int[Array, "b"], y_bD: Float[Array, "b D"]
) -> Float[Array, "T D"]:
    """``y_TD`` with rows added; no token stands twice, one beyond the last goes nowhere."""
    return y_TD.at[token_b].add(y_bD.astype(y_TD.dtype), mode="drop", unique_indices=True)
