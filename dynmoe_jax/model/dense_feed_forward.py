"""The feed-forward of a layer without experts, of any kind that an expert may have.

Axis legend: B batch, L positions, T = B L tokens, D model width, F hidden width.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynmoe_jax import config
from dynmoe_jax.experts import StackedView
from dynmoe_jax.experts.kinds.kind import matrices_in, without_experts
from dynmoe_jax.experts.kinds.swiglu import SwiGLU
from dynmoe_jax.experts.parallel.all_tokens import apply_to_all, hidden_of_all
from dynmoe_jax.experts.weights import gated
from dynmoe_jax.mesh.axes import MODEL, mesh_sizes
from dynmoe_jax.mesh.sharding import split_columns, whole_parameter
from dynmoe_jax.model.components import compute_dtype, drawn
from dynmoe_jax.model.inputs import TokenPositions
from dynmoe_jax.model.kernels.norm.norm import forked
from dynmoe_jax.model.linear.matrices import Matrices
from dynmoe_jax.model.linear.products import times
from dynmoe_jax.model.masks import full, masked_rows, on_stream
from dynmoe_jax.routing import Parameter


class DenseFeedForward(nnx.Module):
    """The function that ``config.model.activation`` names, of all tokens.

    Its parameters are those of one expert, without the axis E.
    """

    def __init__(self, model: config.Model, *, rngs: nnx.Rngs):
        self.kind = model.feed_forward_kind
        declared = self.kind.parameters(model.width, 1, model.hidden_width)
        self.matrix_names = matrices_in(declared)
        shapes = {without_experts(name): declared[name].shape[1:] for name in self.matrix_names}
        self.matrices = Matrices.drawn(self, model, shapes, rngs)
        self.other_names = tuple(name for name in declared if name not in self.matrix_names)
        for name in self.other_names:
            parameter = _of_one(declared[name])
            setattr(self, without_experts(name), drawn(rngs, parameter, model.init_std))
        self.mask_F = full(model.hidden_width) if model.mask_steps else None
        self.dtype, self.plain = compute_dtype(model), model.plain

    def weights(self, stacked: StackedView | None = None) -> None:
        """Nothing that would have to travel before attention."""

    def added_to(
        self,
        x_BLD: Float[Array, "B L D"],
        norm: nnx.RMSNorm,
        positions: TokenPositions,
        weights: None,
    ) -> tuple[Float[Array, "B L D"], Mapping[str, Array] | None]:
        """Returns (the stream plus the feed-forward of its norm, sums over its activations).

        The sums are those that training asks for by
        :attr:`~dynmoe_jax.model.inputs.TrainingInput.activation_sums`; None without.
        """
        x_BLD, normed_BLD = forked(norm, x_BLD, self.plain)
        normed_TD = normed_BLD.reshape(-1, x_BLD.shape[-1])
        training = positions.training
        if training is None or training.activation_sums is None:
            y_TD = on_stream(norm, self(normed_TD))
            return x_BLD + y_TD.reshape(x_BLD.shape), None
        y_TD, activation_TF = self.with_activations(normed_TD)
        activation_BLF = activation_TF.reshape(*x_BLD.shape[:2], -1)
        sums = training.activation_sums(activation_BLF, positions.segment_ids_BL > 0)
        return x_BLD + on_stream(norm, y_TD).reshape(x_BLD.shape), sums

    def __call__(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """Computes the function, SwiGLU by the kernels that know it."""
        if not isinstance(self.kind, SwiGLU):
            return apply_to_all(self.kind, x_TD, self._arrays())
        if self.matrices.apply_themselves:
            return self.output(self.hidden(x_TD)[1])
        return swiglu_of_all(x_TD, *self._swiglu_matrices(), self.dtype, self.plain)

    def with_activations(
        self, x_TD: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T F"]]:
        """(the function, what its nonlinear function is computed of), on any mesh."""
        if not isinstance(self.kind, SwiGLU):
            return hidden_of_all(self.kind, x_TD, self._arrays())
        if self.matrices.apply_themselves:
            gate_TF, hidden_TF = self.hidden(x_TD)
            return self.output(hidden_TF), gate_TF
        return swiglu_and_gate(x_TD, *self._swiglu_matrices(), self.dtype, self.plain)

    def _swiglu_matrices(self) -> tuple[Array, Array]:
        """Gate and up side by side, and down, float32."""
        gate_up_D2F, down_FD = (self._whole(n) for n in ("gate_up_D2F", "down_FD"))
        return gate_up_D2F, down_FD

    def hidden(self, x_TD: Float[Array, "T D"]) -> tuple[Float[Array, "T F"], Float[Array, "T F"]]:
        """(activations, hidden units) on one device, see :class:`ExpertKind`, by the products that
        :meth:`__call__` computes: within one program they are computed once."""
        if not isinstance(self.kind, SwiGLU):
            return self.kind.hidden(self._arrays(), x_TD)
        gate_TF, up_TF = jnp.split(self._times("gate_up_D2F", x_TD), 2, axis=-1)
        return gate_TF, gated(gate_TF, up_TF)

    def output(self, hidden_TF: Float[Array, "T F"]) -> Float[Array, "T D"]:
        """The linear function from hidden units to outputs, on one device."""
        if not isinstance(self.kind, SwiGLU):
            return self.kind.output(self._arrays(), hidden_TF)
        return self._times("down_FD", hidden_TF)

    def _times(self, name: str, x_TX: Float[Array, "T X"]) -> Float[Array, "T Y"]:
        """The product with a matrix on one device."""
        if self.matrices.apply_themselves:
            return self.matrices.applied(self, name, x_TX)
        return times(x_TX, self._whole(name).astype(self.dtype), self.plain)

    def _whole(self, name: str) -> Float[Array, "X Y"]:
        """The whole matrix, with the mask of the hidden units that it reads."""
        matrix = self.matrices.whole(self, name)
        return matrix if self.mask_F is None else masked_rows(name, matrix, self.mask_F)

    def _arrays(self) -> dict[str, Array]:
        """Whole matrices and what else there is, in the compute type, as the kind names them."""
        whole = {name: self._whole(without_experts(name)) for name in self.matrix_names}
        whole |= {name: getattr(self, without_experts(name))[...] for name in self.other_names}
        return {name: array.astype(self.dtype) for name, array in whole.items()}


def _of_one(parameter: Parameter) -> Parameter:
    """The declaration of what one expert of a single one has."""
    init = parameter.init
    return dataclasses.replace(
        parameter,
        shape=parameter.shape[1:],
        init=init if isinstance(init, str) else lambda key, shape: init(key, (1, *shape))[0],
    )


def swiglu_of_all(
    x_TD: Float[Array, "T D"],
    gate_up_D2F: Float[Array, "D 2*F"],
    down_FD: Float[Array, "F D"],
    dtype: jnp.dtype,
    plain: bool,
) -> Float[Array, "T D"]:
    """down(silu(x gate) * (x up)) of all tokens."""
    return swiglu_and_gate(x_TD, gate_up_D2F, down_FD, dtype, plain)[0]


def swiglu_and_gate(
    x_TD: Float[Array, "T D"],
    gate_up_D2F: Float[Array, "D 2*F"],
    down_FD: Float[Array, "F D"],
    dtype: jnp.dtype,
    plain: bool,
) -> tuple[Float[Array, "T D"], Float[Array, "T F"]]:
    """(down(silu(x gate) * (x up)), x gate) of all tokens."""
    gate_up_D2F = whole_parameter("gate_up_D2F", gate_up_D2F, dtype)
    down_FD = whole_parameter("down_FD", down_FD, dtype)
    if mesh_sizes()[MODEL] == 1:
        gate_TF, up_TF = jnp.split(times(x_TD, gate_up_D2F, plain), 2, axis=-1)
        return times(gated(gate_TF, up_TF), down_FD, plain), gate_TF
    gate_DF, up_DF = (split_columns(half) for half in jnp.split(gate_up_D2F, 2, axis=-1))
    gate_TF = x_TD @ gate_DF
    return gated(gate_TF, x_TD @ up_DF) @ down_FD, gate_TF
