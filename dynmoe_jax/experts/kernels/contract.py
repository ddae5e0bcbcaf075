"""Grouped matmul: products of rows with the matrix of the expert whose group they stand in.

One interface, several implementations; :mod:`.choice` says which one a machine uses.

Axis legend: R rows sorted by expert, E experts, I and O the inner and outer width of a matrix.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Forward = Callable[
    [Float[Array, "R I"], Float[Array, "E I O"], Int[Array, "E"]], Float[Array, "R O"]
]
InputGradient = Callable[
    [Float[Array, "R O"], Float[Array, "E I O"], Int[Array, "E"]], Float[Array, "R I"]
]
WeightGradient = Callable[
    [Float[Array, "R I"], Float[Array, "R O"], Int[Array, "E"]], Float[Array, "E I O"]
]


@dataclasses.dataclass(frozen=True)
class GroupedProducts:
    """The grouped matmuls of a linear layer, forward and both gradients, in the type of the rows.

    Sums run in float32.  What an implementation does *not* promise, because kernels do not: rows
    beyond the groups hold anything, NaN included, and so does the weight gradient of an expert
    without rows (openxla/tokamax#887), unless ``zeroes_empty``.  The caller masks both.

    Attributes:
      name: of the implementation.
      forward: (x_RI, w_EIO, group_size_E) -> y_RO, row r times the matrix of its expert.
      input_gradient: (dy_RO, w_EIO, group_size_E) -> dx_RI, the same with transposed matrices.
      weight_gradient: (x_RI, dy_RO, group_size_E) -> dw_EIO, per expert the sum over its rows.
        What stands in rows beyond the groups must be finite.
      row_multiple: R must be a multiple of it.
      zeroes_empty: the weight gradient of an expert without rows is zero, and needs no mask: a pass
        over all weights (docs/measurements.md: v5p-empty-experts).
      ignores_padding: rows beyond the groups may hold anything in all three products.
      swiglu: (rows, type, weights) -> kernels that fuse the first half of the experts, or None
        where there are none for such shapes; see :mod:`.swiglu`.
      sum_of_rows: (y_RO, token_R, group_size_E, row_TK) -> y_TO, the sum of the rows of each token,
        or None where there is no kernel for such shapes; see :mod:`.tpu.combine`.
    """

    name: str
    forward: Forward
    input_gradient: InputGradient
    weight_gradient: WeightGradient
    row_multiple: int = 1
    zeroes_empty: bool = False
    ignores_padding: bool = False
    swiglu: Callable | None = None
    sum_of_rows: Callable | None = None


def _dimensions(contracting, group) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracting, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group,
    )


FORWARD = _dimensions(((1,), (1,)), [0])
INPUT_GRADIENT = _dimensions(((1,), (2,)), [0])
WEIGHT_GRADIENT = _dimensions(((0,), (0,)), [])


def products_of(name: str, ragged_dot_general: Callable, row_multiple: int = 1) -> GroupedProducts:
    """Grouped matmuls by a function with the signature of ``jax.lax.ragged_dot_general``."""

    def product(dimensions):
        def apply(lhs, rhs, group_size_E):
            return ragged_dot_general(
                lhs, rhs, group_size_E, dimensions, preferred_element_type=lhs.dtype
            )

        return apply

    return GroupedProducts(
        name, product(FORWARD), product(INPUT_GRADIENT), product(WEIGHT_GRADIENT), row_multiple
    )


XLA = products_of("xla", jax.lax.ragged_dot_general)
"""XLA's own grouped matmul.  Forward and input gradient are kernels on TPU and dense over the
experts elsewhere; so is the weight gradient, on TPU as well with the compiler of jax 0.10, not with
that of jax 0.12 (docs/measurements.md: v5p-weight-gradient)."""


def _member_RE(rows: int, group_size_E: Int[Array, "E"]) -> Float[Array, "R E"]:
    end_E = jnp.cumsum(group_size_E)
    row_R1 = jnp.arange(rows)[:, None]
    return ((row_R1 >= end_E - group_size_E) & (row_R1 < end_E)).astype(jnp.float32)


def _reference_forward(x_RI, w_EIO, group_size_E):
    member_RE = _member_RE(x_RI.shape[0], group_size_E)
    return jnp.einsum("re,ri,eio->ro", member_RE, x_RI, w_EIO).astype(x_RI.dtype)


def _reference_input_gradient(dy_RO, w_EIO, group_size_E):
    return _reference_forward(dy_RO, jnp.swapaxes(w_EIO, 1, 2), group_size_E)


def _reference_weight_gradient(x_RI, dy_RO, group_size_E):
    member_RE = _member_RE(x_RI.shape[0], group_size_E)
    return jnp.einsum("re,ri,ro->eio", member_RE, x_RI, dy_RO).astype(x_RI.dtype)


REFERENCE = GroupedProducts(
    "reference", _reference_forward, _reference_input_gradient, _reference_weight_gradient
)
"""Oracle of tests and of ``benchmarks.gpu_check``: every expert on every row, by einsum."""
