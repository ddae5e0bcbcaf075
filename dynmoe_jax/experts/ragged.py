"""Dropless experts by grouped matrix products, for accelerators.

Rows are gathered from the tokens, sent through three products of :class:`GroupedProducts` and
gathered back.  Forward and backward are written out as one ``custom_vjp``: autodiff would derive a
weight gradient that is dense over the experts, and scatters in place of gathers.

Kernels visit used rows alone, but element-wise arithmetic and memory follow the static bound R.
So the rows are cut: the first S, always computed, whose gate and up activations are kept for
backward; and the rest, in chunks of n rows, of which a loop visits those that are used and whose
activations backward recomputes.  A trained router seldom needs one.  S is ``saved_rows_per_token``
times T, less where other devices have the other experts.  (Where ``remat`` recomputes whole
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

from dynmoe_jax.experts.combine import add_up
from dynmoe_jax.experts.grouped_products import GroupedProducts
from dynmoe_jax.experts.rows import Rows
from dynmoe_jax.experts.weights import ExpertWeights

USUAL_ROWS_PER_TOKEN = 2.0
"""Where to cut if no rows are saved.  The paper reports a mean of 1.76 experts."""


def ragged_experts(
    x_TD: Float[Array, "T D"],
    rows: Rows,
    weights: ExpertWeights,
    *,
    products: GroupedProducts,
    saved_rows_per_token: float = 2.0,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """y_t = sum over the rows of token t of weight * expert(x_t).

    Args:
      x_TD: tokens.
      rows: which expert computes which token.
      weights: all experts.
      products: the kernels.
      saved_rows_per_token: S / T, how many rows keep their gate and up activations for backward.

    Returns:
      y_TD, and the number of rows that found no place (always 0 here).
    """
    tokens = math.ceil(x_TD.shape[0] * rows.share)
    bounds = part_bounds(rows.token_R.shape[0], tokens, saved_rows_per_token, products.row_multiple)
    missing = bounds.rows - rows.token_R.shape[0]
    padded = dataclasses.replace(
        rows,
        token_R=jnp.pad(rows.token_R, (0, missing)),
        weight_R=jnp.pad(rows.weight_R, (0, missing)),
    )
    saves = saved_rows_per_token > 0
    y_TD = _apply(products, bounds, saves, x_TD, padded.weight_R, weights, _Layout.of(padded))
    return y_TD, jnp.zeros((), jnp.int32)


@dataclasses.dataclass(frozen=True)
class PartBounds:
    """How the rows are cut.

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
        """How many parts after the first hold one of so many rows."""
        return jnp.maximum(0, -(-(rows - self.first) // self.chunk))


def part_bounds(rows: int, tokens: int, saved_rows_per_token: float, multiple: int) -> PartBounds:
    """One part if it holds all rows, otherwise S rows and chunks of a quarter of S.

    All are rounded up to what the kernels ask for.
    """
    first = (saved_rows_per_token or USUAL_ROWS_PER_TOKEN) * tokens
    first, everything, chunk = (
        max(1, math.ceil(n / multiple)) * multiple for n in (first, rows, first / 4)
    )
    if first >= everything:
        return PartBounds(everything, chunk, 0)
    return PartBounds(first, chunk, math.ceil((everything - first) / chunk))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Layout:
    """All of :class:`Rows` that carries no gradient."""

    token_R: Int[Array, "R"]
    group_size_E: Int[Array, "E"]
    row_TK: Int[Array, "T K"] | None

    @classmethod
    def of(cls, rows: Rows) -> "_Layout":
        """That of some rows."""
        return cls(rows.token_R, rows.group_size_E, rows.row_TK)

    def part(self, start: int | Int[Array, ""], size: int) -> "_Part":
        """``size`` rows from ``start`` on."""
        end_E = jnp.cumsum(self.group_size_E)
        first_E, last_E = (
            jnp.clip(at_E, start, start + size) for at_E in (end_E - self.group_size_E, end_E)
        )
        used_n1 = start + jnp.arange(size)[:, None] < end_E[-1]
        token_n = jax.lax.dynamic_slice_in_dim(self.token_R, start, size)
        return _Part(start, token_n, used_n1, last_E - first_E, self.row_TK)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some rows that follow each other, and the share of each group that lies in them."""

    start: int | Int[Array, ""]
    token_n: Int[Array, "n"]
    used_n1: Bool[Array, "n 1"]
    group_size_E: Int[Array, "E"]
    row_TK: Int[Array, "T K"] | None

    def rows_of(self, x_TD: Float[Array, "T D"]) -> Float[Array, "n D"]:
        """The tokens of the rows; zeros in padding."""
        return self.mask(x_TD.at[self.token_n].get(mode="clip"))

    def mask(self, x_nI: Float[Array, "n I"]) -> Float[Array, "n I"]:
        """Zeros in padding rows, which kernels leave uninitialised: 0 * NaN would be NaN."""
        return jnp.where(self.used_n1, x_nI, 0)

    def sum_by_token(self, y_nD: Float[Array, "n D"], tokens: int) -> Float[Array, "T D"]:
        """The sum of the rows of each token, float32."""
        return add_up(y_nD, self.token_n, self.used_n1, self.start, self.row_TK, tokens)

    def mask_empty(self, dw_EIO: Float[Array, "E I O"]) -> Float[Array, "E I O"]:
        """Zeros for experts without rows, for which kernels may leave anything."""
        return jnp.where((self.group_size_E > 0)[:, None, None], dw_EIO, 0)


def _swiglu(gate_up_n2F: Float[Array, "n 2*F"]) -> Float[Array, "n F"]:
    """silu(gate) * up, float32; the halves lie side by side, as the product leaves them."""
    # Cut, then cast: the other way round XLA writes the whole of it in float32 (v5p).
    gate_nF, up_nF = (half.astype(jnp.float32) for half in jnp.split(gate_up_n2F, 2, axis=-1))
    return jax.nn.silu(gate_nF) * up_nF


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(products, bounds, saves, x_TD, weight_R, weights, layout):
    return _forward(products, bounds, False, x_TD, weight_R, weights, layout)[0]


def _forward(products, bounds, saves, x_TD, weight_R, weights, layout):
    gate_up_ED2F = weights.gate_up_ED2F

    def outputs(start, size):
        part = layout.part(start, size)
        gate_up_n2F = products.forward(part.rows_of(x_TD), gate_up_ED2F, part.group_size_E)
        # Weighted before the last product, where it costs no pass over memory of its own.
        weight_n1 = jax.lax.dynamic_slice_in_dim(weight_R, start, size)[:, None]
        hidden_nF = part.mask(_swiglu(gate_up_n2F) * weight_n1).astype(x_TD.dtype)
        y_nD = products.forward(hidden_nF, weights.down_EFD, part.group_size_E)
        return part.sum_by_token(y_nD, x_TD.shape[0]), gate_up_n2F

    y_TD, gate_up_S2F = outputs(0, bounds.first)
    if bounds.chunks:

        def add_chunk(i, y_TD):
            return y_TD + outputs(bounds.first + i * bounds.chunk, bounds.chunk)[0]

        used = bounds.used_chunks(jnp.sum(layout.group_size_E))
        y_TD = jax.lax.fori_loop(0, used, add_chunk, y_TD)
    kept = gate_up_S2F if saves else None
    return y_TD.astype(x_TD.dtype), (x_TD, weight_R, weights, layout, kept)


def _backward(products, bounds, saves, residuals, dy_TD):
    x_TD, weight_R, weights, layout, kept_S2F = residuals
    gate_up_ED2F, tokens = weights.gate_up_ED2F, x_TD.shape[0]

    def gradients(start, size, gate_up_n2F):
        """(dx_TD, dgate_up_ED2F, ddown_EFD), dweight_n of some rows."""
        part = layout.part(start, size)
        weight_n1 = jax.lax.dynamic_slice_in_dim(weight_R, start, size)[:, None]
        x_nD, dy_nD = part.rows_of(x_TD), part.rows_of(dy_TD)
        if gate_up_n2F is None:
            gate_up_n2F = products.forward(x_nD, gate_up_ED2F, part.group_size_E)
        hidden_nF, pull_back = jax.vjp(_swiglu, gate_up_n2F)
        dhidden_nF = products.input_gradient(dy_nD, weights.down_EFD, part.group_size_E)
        dhidden_nF = dhidden_nF.astype(jnp.float32)
        # <dy, hidden down> = <dy down^T, hidden>: the combine weight's gradient needs no product
        # of its own.
        dweight_n1 = jnp.sum(part.mask(dhidden_nF * hidden_nF), axis=-1, keepdims=True)
        dgate_up_n2F = part.mask(pull_back(dhidden_nF * weight_n1)[0])
        weighted_nF = part.mask(hidden_nF * weight_n1).astype(x_TD.dtype)
        ddown_EFD = products.weight_gradient(weighted_nF, dy_nD, part.group_size_E)
        dgate_up_ED2F = products.weight_gradient(x_nD, dgate_up_n2F, part.group_size_E)
        dx_nD = products.input_gradient(dgate_up_n2F, gate_up_ED2F, part.group_size_E)
        dx_TD = part.sum_by_token(dx_nD, tokens)
        dweights = dgate_up_ED2F, ddown_EFD
        if not products.zeroes_empty:
            dweights = map(part.mask_empty, dweights)
        sums = dx_TD, *dweights
        return sums, dweight_n1[:, 0]

    sums, dweight_S = gradients(0, bounds.first, kept_S2F)
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
    return dx_TD.astype(x_TD.dtype), dweight_R, dweights, None


_apply.defvjp(_forward, _backward)
