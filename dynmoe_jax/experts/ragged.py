"""Dropless experts by grouped matrix products, for accelerators.

Rows are gathered from the tokens, sent through three products of :class:`GroupedProducts` and
gathered back.  Forward and backward are written out as one ``custom_vjp``: autodiff would derive a
weight gradient that is dense over the experts, and scatters in place of gathers.

Kernels visit used rows alone, but element-wise arithmetic and memory follow the static bound R.
So the layer is cut in two: the first S rows, always computed, whose gate and up activations are
kept for backward; and the rest, under a ``cond``, because a trained router seldom needs it, whose
activations backward recomputes.  S is ``saved_rows_per_token`` times T.  (Where ``remat``
recomputes whole layers, what is kept here lives no longer than the backward pass of one layer.)

Axis legend: T tokens, K slots per token, E experts, R rows, n rows of one part, D model width, F
hidden width of an expert, G = 2F gate and up.
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
    bounds = part_bounds(
        rows.token_R.shape[0], x_TD.shape[0], saved_rows_per_token, products.row_multiple
    )
    missing = bounds[-1] - rows.token_R.shape[0]
    padded = dataclasses.replace(
        rows,
        token_R=jnp.pad(rows.token_R, (0, missing)),
        weight_R=jnp.pad(rows.weight_R, (0, missing)),
    )
    saves = saved_rows_per_token > 0
    y_TD = _apply(products, bounds, saves, x_TD, padded.weight_R, weights, _Layout.of(padded))
    return y_TD, jnp.zeros((), jnp.int32)


def part_bounds(
    rows: int, tokens: int, saved_rows_per_token: float, multiple: int
) -> tuple[int, ...]:
    """Where the parts of the rows end: (S, R), or (R,) if one part holds them all.

    Both are rounded up to what the kernels ask for.
    """
    first = (saved_rows_per_token or USUAL_ROWS_PER_TOKEN) * tokens
    first, everything = (math.ceil(n / multiple) * multiple for n in (first, rows))
    return (first, everything) if first < everything else (everything,)


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

    def part(self, start: int, stop: int) -> "_Part":
        """Rows ``start`` to ``stop``."""
        end_E = jnp.cumsum(self.group_size_E)
        clipped_E = [jnp.clip(at_E, start, stop) for at_E in (end_E - self.group_size_E, end_E)]
        used_n1 = jnp.arange(start, stop)[:, None] < end_E[-1]
        group_size_E = clipped_E[1] - clipped_E[0]
        return _Part(start, self.token_R[start:stop], used_n1, group_size_E, self.row_TK)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some rows that follow each other, and the share of each group that lies in them."""

    start: int
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


def _swiglu(gate_up_nG: Float[Array, "n G"]) -> Float[Array, "n F"]:
    """silu(gate) * up, float32; the halves lie side by side, as the product leaves them."""
    gate_nF, up_nF = jnp.split(gate_up_nG.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate_nF) * up_nF


def _merged(weights: ExpertWeights) -> Float[Array, "E D G"]:
    experts, width = weights.gate_up_ED2F.shape[:2]
    return weights.gate_up_ED2F.reshape(experts, width, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(products, bounds, saves, x_TD, weight_R, weights, layout):
    return _forward(products, bounds, False, x_TD, weight_R, weights, layout)[0]


def _forward(products, bounds, saves, x_TD, weight_R, weights, layout):
    gate_up_EDG = _merged(weights)

    def outputs(start, stop):
        part = layout.part(start, stop)
        gate_up_nG = products.forward(part.rows_of(x_TD), gate_up_EDG, part.group_size_E)
        # Weighted before the last product, where it costs no pass over memory of its own.
        hidden_nF = part.mask(_swiglu(gate_up_nG) * weight_R[start:stop, None]).astype(x_TD.dtype)
        y_nD = products.forward(hidden_nF, weights.down_EFD, part.group_size_E)
        return part.sum_by_token(y_nD, x_TD.shape[0]), gate_up_nG

    y_TD, gate_up_SG = outputs(0, bounds[0])
    if len(bounds) > 1:
        used = jnp.sum(layout.group_size_E) > bounds[0]
        y_TD = jax.lax.cond(used, lambda y_TD: y_TD + outputs(*bounds)[0], lambda y_TD: y_TD, y_TD)
    kept = gate_up_SG if saves else None
    return y_TD.astype(x_TD.dtype), (x_TD, weight_R, weights, layout, kept)


def _backward(products, bounds, saves, residuals, dy_TD):
    x_TD, weight_R, weights, layout, kept_SG = residuals
    gate_up_EDG, tokens = _merged(weights), x_TD.shape[0]

    def gradients(start, stop, gate_up_nG):
        """(dx_TD, dgate_up_EDG, ddown_EFD), dweight_n of some rows."""
        part, weight_n1 = layout.part(start, stop), weight_R[start:stop, None]
        x_nD, dy_nD = part.rows_of(x_TD), part.rows_of(dy_TD)
        if gate_up_nG is None:
            gate_up_nG = products.forward(x_nD, gate_up_EDG, part.group_size_E)
        hidden_nF, pull_back = jax.vjp(_swiglu, gate_up_nG)
        dhidden_nF = products.input_gradient(dy_nD, weights.down_EFD, part.group_size_E)
        dhidden_nF = dhidden_nF.astype(jnp.float32)
        # <dy, hidden down> = <dy down^T, hidden>: the combine weight's gradient needs no product
        # of its own.
        dweight_n1 = jnp.sum(part.mask(dhidden_nF * hidden_nF), axis=-1, keepdims=True)
        dgate_up_nG = part.mask(pull_back(dhidden_nF * weight_n1)[0])
        weighted_nF = part.mask(hidden_nF * weight_n1).astype(x_TD.dtype)
        ddown_EFD = products.weight_gradient(weighted_nF, dy_nD, part.group_size_E)
        dgate_up_EDG = products.weight_gradient(x_nD, dgate_up_nG, part.group_size_E)
        dx_nD = products.input_gradient(dgate_up_nG, gate_up_EDG, part.group_size_E)
        dx_TD = part.sum_by_token(dx_nD, tokens)
        sums = dx_TD, part.mask_empty(dgate_up_EDG), part.mask_empty(ddown_EFD)
        return sums, dweight_n1[:, 0]

    sums, dweight_R = gradients(0, bounds[0], kept_SG)
    if len(bounds) > 1:

        def with_rest(sums):
            rest, dweight_n = gradients(*bounds, None)
            return jax.tree.map(jnp.add, sums, rest), dweight_n

        def without_rest(sums):
            return sums, jnp.zeros(bounds[1] - bounds[0], jnp.float32)

        used = jnp.sum(layout.group_size_E) > bounds[0]
        sums, dweight_n = jax.lax.cond(used, with_rest, without_rest, sums)
        dweight_R = jnp.concatenate([dweight_R, dweight_n])
    dx_TD, dgate_up_EDG, ddown_EFD = sums
    dweights = ExpertWeights(dgate_up_EDG.reshape(weights.gate_up_ED2F.shape), ddown_EFD)
    return dx_TD.astype(x_TD.dtype), dweight_R, dweights, None


_apply.defvjp(_forward, _backward)
