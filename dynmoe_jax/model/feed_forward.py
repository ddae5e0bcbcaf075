"""The feed-forward of a layer: dense SwiGLU, or experts chosen by a router.

Axis legend: B batch, L positions, T = B L tokens, D model width, E experts, F hidden width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax import config
from dynmoe_jax.experts import (
    ExpertWeights,
    StackedView,
    apply_experts,
    make_backend,
    make_transport,
)
from dynmoe_jax.experts.weights import gated, swiglu
from dynmoe_jax.mesh.axes import EXPERT, MODEL, mesh_sizes
from dynmoe_jax.mesh.sharding import by_token, split_columns, whole_parameter
from dynmoe_jax.model.components import added, compute_dtype, matrix
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.kernels.norm.router_logits import norm_and_logits
from dynmoe_jax.model.linear import times
from dynmoe_jax.routing import Routing, make_router


class DenseFeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202) without biases."""

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, F = model.width, model.hidden_width
        self.gate_up_D2F = matrix(rngs, (D, 2 * F), model.init_std)
        self.down_FD = matrix(rngs, (F, D), model.init_std)
        self.dtype = compute_dtype(model)

    def weights(self, stacked: StackedView | None = None) -> None:
        """Nothing that would have to travel before attention."""

    def added_to(
        self,
        x_BLD: Float[Array, "B L D"],
        norm: nnx.RMSNorm,
        valid_BL: Bool[Array, "B L"],
        weights: None,
    ) -> tuple[Float[Array, "B L D"], None, None]:
        """Returns (the stream plus the feed-forward of its norm, no routing, no dropped rows)."""
        x_BLD, normed_BLD = forked(norm, x_BLD)
        y_TD = self(normed_BLD.reshape(-1, x_BLD.shape[-1]))
        return x_BLD + y_TD.reshape(x_BLD.shape), None, None

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computes down(silu(x gate) * (x up))."""
        return _swiglu_of_all(x_TD, self.gate_up_D2F, self.down_FD, self.dtype)


class MoEFeedForward(nnx.Module):
    """A router, the experts it chooses from, and an expert that all tokens share if asked for.

    The shared expert is DeepSeekMoE's (arXiv 2401.06066; several of them are one wide one), with
    a gate Qwen2-MoE's (arXiv 2407.10671).
    """

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        D, E, F = model.width, model.moe.num_experts, model.moe.hidden_width
        self.router_DE = matrix(rngs, (D, E), model.init_std)
        self.gate_up_ED2F = matrix(rngs, (E, D, 2 * F), model.init_std)
        self.down_EFD = matrix(rngs, (E, F, D), model.init_std)
        if model.moe.shared_hidden_width:
            shared = model.moe.shared_hidden_width
            self.shared_gate_up_D2F = matrix(rngs, (D, 2 * shared), model.init_std)
            self.shared_down_FD = matrix(rngs, (shared, D), model.init_std)
        if model.moe.shared_gate:
            self.shared_router_D1 = matrix(rngs, (D, 1), model.init_std)
        self.moe = model.moe
        self.dtype = compute_dtype(model)
        self.route = make_router(model.moe)
        self.backend = make_backend(model.moe)

    def weights(self, stacked: StackedView | None = None) -> ExpertWeights:
        """All experts, in the compute type.

        Args:
          stacked: where these are among the experts of all layers, if that is known.
        """
        matrices = self.gate_up_ED2F[...], self.down_EFD[...]
        return ExpertWeights(*(array.astype(self.dtype) for array in matrices), stacked)

    def project(
        self, norm: nnx.RMSNorm, x_BLD: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B L D"], Float[Array, "T D"], Float[Array, "T E"]]:
        """(the stream, the tokens of its norm, the router's logits).

        Args:
          norm: of what the experts get.
          x_BLD: the stream.
        """
        router_DE = whole_parameter("router_DE", self.router_DE[...], jnp.float32)
        x_BLD, normed_BLD, logits_BLE = norm_and_logits(norm, x_BLD, router_DE)
        flat = (a.reshape(-1, a.shape[-1]) for a in (normed_BLD, logits_BLE))
        return x_BLD, *flat

    def added_to(
        self,
        x_BLD: Float[Array, "B L D"],
        norm: nnx.RMSNorm,
        valid_BL: Bool[Array, "B L"],
        weights: ExpertWeights | None,
    ) -> tuple[Float[Array, "B L D"], Routing, Int[Array, ""]]:
        """Returns (the stream plus what the experts of its norm add, routing, rows dropped).

        Args:
          x_BLD: the residual stream.
          norm: of what the router and the experts read.
          valid_BL: a token that is not valid uses no expert.
          weights: what :meth:`weights` returned.
        """
        x_BLD, normed_TD, logits_TE = self.project(norm, x_BLD)
        y_TD, routing, dropped = self(normed_TD, logits_TE, valid_BL.reshape(-1), weights)
        x_TD = added(x_BLD.reshape(y_TD.shape), y_TD)
        return x_TD.reshape(x_BLD.shape), routing, dropped

    def __call__(
        self,
        x_TD: Float[Array, "T D"],
        logits_TE: Float[Array, "T E"],
        valid_T: Bool[Array, "T"],
        weights: ExpertWeights | None = None,
    ) -> tuple[Float[Array, "T D"], Routing, Int[Array, ""]]:
        """Returns (y_TD, routing, rows dropped).

        Args:
          x_TD: tokens.
          logits_TE: what :meth:`project` returned.
          valid_T: a token that is not valid uses no expert.
          weights: what :meth:`weights` returned.
        """
        routing = by_token(self.route, logits_TE, valid_T)
        if self.moe.routed_scale != 1.0:
            scaled_TK = self.moe.routed_scale * routing.weight_TK
            routing = dataclasses.replace(routing, weight_TK=scaled_TK)
        y_TD, dropped = apply_experts(
            x_TD,
            routing,
            weights or self.weights(),
            self.backend,
            self.moe.rows_per_token,
            make_transport(self.moe, mesh_sizes()[EXPERT]),
        )
        if self.moe.shared_hidden_width:
            y_TD += self.shared(x_TD)
        return y_TD, routing, dropped

    def shared(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computes what the shared expert adds to every token."""
        y_TD = _swiglu_of_all(x_TD, self.shared_gate_up_D2F, self.shared_down_FD, self.dtype)
        if not self.moe.shared_gate:
            return y_TD
        router_D1 = whole_parameter("shared_router_D1", self.shared_router_D1[...], self.dtype)
        return y_TD * jax.nn.sigmoid(x_TD @ router_D1)


def _swiglu_of_all(
    x_TD: Float[Array, "T D"], gate_up_D2F: nnx.Param, down_FD: nnx.Param, dtype: jnp.dtype
) -> Float[Array, "T D"]:
    """down(silu(x gate) * (x up)) of all tokens."""
    gate_up_D2F = whole_parameter("gate_up_D2F", gate_up_D2F[...], dtype)
    down_FD = whole_parameter("down_FD", down_FD[...], dtype)
    if mesh_sizes()[MODEL] == 1:
        return times(swiglu(times(x_TD, gate_up_D2F)), down_FD)
    gate_DF, up_DF = (split_columns(half) for half in jnp.split(gate_up_D2F, 2, axis=-1))
    return gated(x_TD @ gate_DF, x_TD @ up_DF) @ down_FD
