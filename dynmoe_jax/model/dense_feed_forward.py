"""The feed-forward of a layer without experts: dense SwiGLU.

Axis legend: B batch, L positions, T = B L tokens, D model width, F hidden width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.experts import StackedView
from dynmoe_jax.experts.weights import gated, swiglu
from dynmoe_jax.mesh.axes import MODEL, mesh_sizes
from dynmoe_jax.mesh.sharding import split_columns, whole_parameter
from dynmoe_jax.model.components import compute_dtype
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.linear.matrices import Matrices
from dynmoe_jax.model.linear.products import times


class DenseFeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202) without biases."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, F = model.width, model.hidden_width
        shapes = {"gate_up_D2F": (D, 2 * F), "down_FD": (F, D)}
        self.matrices = Matrices.drawn(self, model, shapes, rngs)
        self.dtype, self.plain = compute_dtype(model), model.plain

    def weights(self, stacked: StackedView | None = None) -> None:
        """Nothing that would have to travel before attention."""

    def added_to(
        self,
        x_BLD: Float[Array, "B L D"],
        norm: nnx.RMSNorm,
        positions: TokenPositions,
        weights: None,
    ) -> tuple[Float[Array, "B L D"], None]:
        """Returns (the stream plus the feed-forward of its norm, no record of routing)."""
        x_BLD, normed_BLD = forked(norm, x_BLD, self.plain)
        y_TD = self(normed_BLD.reshape(-1, x_BLD.shape[-1]))
        return x_BLD + y_TD.reshape(x_BLD.shape), None

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computes down(silu(x gate) * (x up))."""
        matrices = self.matrices
        if matrices.apply_themselves:
            hidden_TF = swiglu(matrices.applied(self, "gate_up_D2F", x_TD))
            return matrices.applied(self, "down_FD", hidden_TF)
        gate_up_D2F, down_FD = (matrices.whole(self, n) for n in ("gate_up_D2F", "down_FD"))
        return swiglu_of_all(x_TD, gate_up_D2F, down_FD, self.dtype, self.plain)


def swiglu_of_all(
    x_TD: Float[Array, "T D"],
    gate_up_D2F: Float[Array, "D 2*F"],
    down_FD: Float[Array, "F D"],
    dtype: jnp.dtype,
    plain: bool,
) -> Float[Array, "T D"]:
    """down(silu(x gate) * (x up)) of all tokens."""
    gate_up_D2F = whole_parameter("gate_up_D2F", gate_up_D2F, dtype)
    down_FD = whole_parameter("down_FD", down_FD, dtype)
    if mesh_sizes()[MODEL] == 1:
        return times(swiglu(times(x_TD, gate_up_D2F, plain)), down_FD, plain)
    gate_DF, up_DF = (split_columns(half) for half in jnp.split(gate_up_D2F, 2, axis=-1))
    return gated(x_TD @ gate_DF, x_TD @ up_DF) @ down_FD
