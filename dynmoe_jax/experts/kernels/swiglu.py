"""First half of an expert, before its last matmul: gate and up, SwiGLU, combine weight.

One interface: in terms of grouped products here, or fused with them
(:mod:`.tpu.swiglu` for TPU, :mod:`.gpu.swiglu` for GPU), of which this is the twin.

Axis legend: n rows of one part, E experts, D model width, F hidden width of an expert.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.kernels.contract import GroupedProducts
from dynmoe_jax.experts.weights import ExpertWeights, gated

FORWARD, BACKWARD = "grouped_swiglu", "grouped_swiglu_gradient"
KEPT_BACKWARD = "grouped_hidden_gradient"
"""Names of the fused kernels, by which the planner knows them.  The last does not compute gate and
up again."""

Kept = Float[Array, "n 2*F"] | None

_Rows, _Column, _Sizes = Float[Array, "n D"], Float[Array, "n 1"], Int[Array, "E"]
Forward = Callable[[_Rows, _Column, ExpertWeights, _Sizes], tuple[Float[Array, "n F"], Kept]]
Backward = Callable[
    [_Rows, _Rows, _Column, ExpertWeights, _Sizes, Kept],
    tuple[Float[Array, "n F"], Float[Array, "n 2*F"], _Column],
]


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """Hidden activations of rows sorted by expert, and their gradients.

    ``hidden = weight * silu(x gate) * (x up)`` with the combine weight of the row, which costs no
    pass over memory of its own before the last product.  Rows beyond the groups may hold anything
    where the products they go to ignore them.

    Attributes:
      forward: (x_nD, weight_n1, weights, group_size_E) -> hidden_nF, and what backward is given.
      backward: (x_nD, dy_nD, weight_n1, weights, group_size_E, kept) -> hidden_nF, dgate_up_n2F,
        dweight_n1, where dy_nD is the gradient of the rows that the last product makes.
      keeps: whether it can give backward anything; else backward computes gate and up again.
    """

    forward: Forward
    backward: Backward
    keeps: bool = True


@functools.cache
def plain_swiglu(products: GroupedProducts) -> SwiGLU:
    """Makes a :class:`SwiGLU` of grouped matmuls, with a pass of its own for the arithmetic."""

    def forward(x_nD, weight_n1, weights, group_size_E):
        gate_up_n2F = products.forward(x_nD, weights.gate_up_ED2F, group_size_E)
        used_n1 = used_rows(x_nD.shape[0], group_size_E)
        hidden_nF = jnp.where(used_n1, _swiglu(gate_up_n2F) * weight_n1, 0)
        return hidden_nF.astype(x_nD.dtype), gate_up_n2F

    def backward(x_nD, dy_nD, weight_n1, weights, group_size_E, gate_up_n2F):
        used_n1 = used_rows(x_nD.shape[0], group_size_E)
        if gate_up_n2F is None:
            gate_up_n2F = products.forward(x_nD, weights.gate_up_ED2F, group_size_E)
        hidden_nF, pull_back = jax.vjp(_swiglu, gate_up_n2F)
        dhidden_nF = products.input_gradient(dy_nD, weights.down_EFD, group_size_E)
        dhidden_nF = dhidden_nF.astype(jnp.float32)
        # <dy, hidden down> = <dy down^T, hidden>: the combine weight's gradient needs no product
        # of its own.
        dweight_n1 = jnp.sum(dhidden_nF * hidden_nF, axis=-1, keepdims=True)
        (dgate_up_n2F,) = pull_back(dhidden_nF * weight_n1)
        weighted_nF = jnp.where(used_n1, hidden_nF * weight_n1, 0).astype(x_nD.dtype)
        return weighted_nF, jnp.where(used_n1, dgate_up_n2F, 0), dweight_n1

    return SwiGLU(forward, backward)


def used_rows(rows: int, group_size_E: Int[Array, "E"]) -> Bool[Array, "n 1"]:
    """Mask of the rows that belong to a group."""
    return jnp.arange(rows)[:, None] < jnp.sum(group_size_E)


def _swiglu(gate_up_n2F: Float[Array, "n 2*F"]) -> Float[Array, "n F"]:
    """silu(gate) * up, float32; the halves lie side by side, as the product leaves them."""
    # Cut, then cast: the other way round XLA writes the whole of it in float32 (v5p).
    return gated(*(half.astype(jnp.float32) for half in jnp.split(gate_up_n2F, 2, axis=-1)))
