"""Dropless experts by grouped matmuls, for accelerators.

Rows are gathered from the tokens, sent through :class:`SwiGLU` and a last product, and gathered
back.  Forward and backward are written out as one ``custom_vjp``: autodiff would derive a weight
gradient that is dense over the experts, and scatters in place of gathers.

Kernels visit used rows alone, but element-wise arithmetic and memory follow the static bound R.
So the rows are cut: the first S, always computed, whose gate and up activations are kept for
backward, unless to compute them again is cheaper (:mod:`.tpu.swiglu`); and the rest, in chunks
of n rows, of which a loop visits those that are used and whose activations backward recomputes.  A
trained router seldom needs one.  S is ``saved_rows_per_token`` times T (the usual number of rows if
that is 0), less where other devices have the other experts.  (Where ``remat`` recomputes whole
layers, what is kept here lives no longer than the backward pass of one layer.)

Axis legend: T tokens, K slots per token, E experts, R rows, S rows kept, n rows of one part, D
model width, F hidden width of an expert.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.kernels.combine import add_up
from dynmoe_jax.experts.kernels.contract import GroupedProducts
from dynmoe_jax.experts.kernels.swiglu import SwiGLU, plain_swiglu
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights


def ragged_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights,
    *,
    products: GroupedProducts,
    saved_rows_per_token: float = 2.0,
    usual_rows_per_token: float = 2.0,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t).

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts.
      products: the kernels.
      saved_rows_per_token: S / T, how many rows keep their gate and up activations for backward.
      usual_rows_per_token: S / T if none do.

    Returns:
      y_TD, and the number of rows dropped (always 0 here).
    """
    tokens = math.ceil(x_TD.shape[0] * rows.share)
    cut = saved_rows_per_token or usual_rows_per_token
    bounds = part_bounds(rows.token_R.shape[0], tokens, cut, products.row_multiple)
    missing = bounds.rows - rows.token_R.shape[0]
    padded = dataclasses.replace(
        rows,
        token_R=jnp.pad(rows.token_R, (0, missing)),
        weight_R=jnp.pad(rows.weight_R, (0, missing)),
    )
    fused = products.swiglu(bounds.first, x_TD.dtype, weights) if products.swiglu else None
    kernels = _Kernels(products, fused or plain_swiglu(products), saved_rows_per_token > 0)
    y_TD = _grouped_experts(kernels, bounds, x_TD, padded.weight_R, weights, _Layout.of(padded))
    return y_TD, jnp.zeros((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """Kernels of the rows, and whether gate and up of the first part may be kept."""

    products: GroupedProducts
    swiglu: SwiGLU
    keeps: bool

    def rows_of(self, part: "_Part", x_TD: Float[Array, "T D"]) -> Float[Array, "n D"]:
        """Gathers the tokens of a part's rows; zeros in padding where products do not ignore it."""
        x_nD = part.rows_of(x_TD)
        return x_nD if self.products.ignores_padding else part.mask(x_nD)

    def sum_by_token(
        self, part: "_Part", y_nD: Float[Array, "n D"], tokens: int
    ) -> Float[Array, "T D"]:
        """Sums the rows of each token, in float32, rounded to the type of the rows."""
        kernel = self.products.sum_of_rows if part.row_TK is not None else None
        y_TD = kernel(y_nD, *part.row_positions) if kernel else None
        return part.sum_by_token(y_nD, tokens).astype(y_nD.dtype) if y_TD is None else y_TD


@dataclasses.dataclass(frozen=True)
class PartBounds:
    """Sizes of the parts that the rows are cut into.

    Attributes:
      first: S.
      chunk: n, rows of each later part.
      chunks: how many of them there may be.
    """

    first: int
    chunk: int
    chunks: int

    @property
    def rows(self) -> int:
        """R, filled up to whole parts."""
        return self.first + self.chunk * self.chunks

    def used_chunks(self, rows: Int[Array, ""]) -> Int[Array, ""]:
        """Number of parts after the first that hold one of so many rows."""
        return jnp.maximum(0, -(-(rows - self.first) // self.chunk))


def part_bounds(rows: int, tokens: int, rows_per_token: float, multiple: int) -> PartBounds:
    """Cuts the rows: one part if it holds all, otherwise S rows and chunks of a quarter of S.

    All are rounded up to what the kernels ask for.
    """
    first = rows_per_token * tokens
    first, everything, chunk = (
        max(1, math.ceil(n / multiple)) * multiple for n in (first, rows, first / 4)
    )
    if first >= everything:
        return PartBounds(everything, chunk, 0)
    return PartBounds(first, chunk, math.ceil((everything - first) / chunk))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of :class:`Rows`: everything that carries no gradient."""

    token_R: Int[Array, "R"]
    group_size_E: Int[Array, "E"]
    row_TK: Int[Array, "T K"] | None

    @classmethod
    def of(cls, rows: Rows) -> "_Layout":
        """The layout of ``rows``."""
        return cls(rows.token_R, rows.group_size_E, rows.row_TK)

    def part(self, start: int | Int[Array, ""], size: int) -> "_Part":
        """Cuts out ``size`` rows from ``start`` on."""
        end_E = jnp.cumsum(self.group_size_E)
        first_E, last_E = (
            jnp.clip(at_E, start, start + size) for at_E in (end_E - self.group_size_E, end_E)
        )
        used_n1 = start + jnp.arange(size)[:, None] < end_E[-1]
        token_n = jax.lax.dynamic_slice_in_dim(self.token_R, start, size)
        return _Part(start, token_n, used_n1, last_E - first_E, self.row_TK)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Consecutive rows, and the share of each group that lies in them."""

    start: int | Int[Array, ""]
    token_n: Int[Array, "n"]
    used_n1: Bool[Array, "n 1"]
    group_size_E: Int[Array, "E"]
    row_TK: Int[Array, "T K"] | None

    def rows_of(self, x_TD: Float[Array, "T D"]) -> Float[Array, "n D"]:
        """Gathers the tokens of the rows (permute); anything in padding."""
        return x_TD.at[self.token_n].get(mode="clip")

    def mask(self, x_nI: Float[Array, "n I"]) -> Float[Array, "n I"]:
        """Zeros in padding rows: kernels leave them uninitialised, and 0 * NaN would be NaN."""
        return jnp.where(self.used_n1, x_nI, 0)

    def sum_by_token(self, y_nD: Float[Array, "n D"], tokens: int) -> Float[Array, "T D"]:
        """Sums the rows of each token (unpermute), float32."""
        return add_up(y_nD, self.token_n, self.used_n1, self.start, self.row_TK, tokens)

    @property
    def row_positions(self) -> tuple[Int[Array, "n"], Int[Array, "E"], Int[Array, "T K"]]:
        """Token of each row, rows of each expert, rows of each token; the part's first is row 0."""
        return self.token_n, self.group_size_E, self.row_TK - self.start

    def mask_empty(self, dw_EIO: Float[Array, "E I O"]) -> Float[Array, "E I O"]:
        """Zeros for experts without rows, for which kernels may leave anything."""
        return jnp.where((self.group_size_E > 0)[:, None, None], dw_EIO, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_experts(kernels, bounds, x_TD, weight_R, weights, layout):
    return _grouped_forward(kernels, bounds, x_TD, weight_R, weights, layout)[0]


def _grouped_forward(kernels, bounds, x_TD, weight_R, weights, layout):
    def outputs(start, size):
        part = layout.part(start, size)
        weight_n1 = jax.lax.dynamic_slice_in_dim(weight_R, start, size)[:, None]
        x_nD = kernels.rows_of(part, x_TD)
        hidden_nF, kept = kernels.swiglu.forward(x_nD, weight_n1, weights, part.group_size_E)
        y_nD = kernels.products.forward(hidden_nF, weights.down_EFD, part.group_size_E)
        return kernels.sum_by_token(part, y_nD, x_TD.shape[0]), kept

    # In the type of the tokens, though sums in float32 would round once less where chunks are
    # used: XLA writes what a loop carries, and its cast is a pass of its own
    # (docs/measurements.md: v5p-loop-cast).
    y_TD, kept = outputs(0, bounds.first)
    if bounds.chunks:

        def add_chunk(i, y_TD):
            return y_TD + outputs(bounds.first + i * bounds.chunk, bounds.chunk)[0]

        used = bounds.used_chunks(jnp.sum(layout.group_size_E))
        y_TD = jax.lax.fori_loop(0, used, add_chunk, y_TD)
    kept = kept if kernels.keeps else None
    return y_TD, (x_TD, weight_R, weights, layout, kept)


def _grouped_backward(kernels, bounds, residuals, dy_TD):
    x_TD, weight_R, weights, layout, kept = residuals
    products = kernels.products

    def gradients(start, size, kept):
        """(dx_TD, dgate_up_ED2F, ddown_EFD), dweight_n of some rows."""
        part = layout.part(start, size)
        weight_n1 = jax.lax.dynamic_slice_in_dim(weight_R, start, size)[:, None]
        x_nD, dy_nD = kernels.rows_of(part, x_TD), kernels.rows_of(part, dy_TD)
        hidden_nF, dgate_up_n2F, dweight_n1 = kernels.swiglu.backward(
            x_nD, dy_nD, weight_n1, weights, part.group_size_E, kept
        )
        # In this order: gradients of parameters travel while what comes next is computed.
        in_turn = jax.lax.optimization_barrier
        ddown_EFD = products.weight_gradient(hidden_nF, dy_nD, part.group_size_E)
        ddown_EFD, dgate_up_n2F = in_turn((ddown_EFD, dgate_up_n2F))
        dgate_up_ED2F = products.weight_gradient(x_nD, dgate_up_n2F, part.group_size_E)
        dgate_up_ED2F, dgate_up_n2F = in_turn((dgate_up_ED2F, dgate_up_n2F))
        dx_nD = products.input_gradient(dgate_up_n2F, weights.gate_up_ED2F, part.group_size_E)
        dx_TD = kernels.sum_by_token(part, dx_nD, x_TD.shape[0])
        dweights = dgate_up_ED2F, ddown_EFD
        if not products.zeroes_empty:
            dweights = map(part.mask_empty, dweights)
        sums = dx_TD, *dweights
        return sums, part.mask(dweight_n1)[:, 0]

    sums, dweight_S = gradients(0, bounds.first, kept)
    dweight_R = jnp.pad(dweight_S, (0, bounds.rows - bounds.first))
    if bounds.chunks:

        def add_chunk(i, carry):
            sums, dweight_R = carry
            start = bounds.first + i * bounds.chunk
            more, dweight_n = gradients(start, bounds.chunk, None)
            dweight_R = jax.lax.dynamic_update_slice_in_dim(dweight_R, dweight_n, start, 0)
            return jax.tree.map(jnp.add, sums, more), dweight_R

        used = bounds.used_chunks(jnp.sum(layout.group_size_E))
        sums, dweight_R = jax.lax.fori_loop(0, used, add_chunk, (sums, dweight_R))
    dx_TD, dgate_up_ED2F, ddown_EFD = sums
    dweights = ExpertWeights(dgate_up_ED2F, ddown_EFD)
    return dx_TD, dweight_R, dweights, None


_grouped_experts.defvjp(_grouped_forward, _grouped_backward)
