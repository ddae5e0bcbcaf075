"""The parameters of all experts of one layer.

Axis legend: E experts, D model width, F hidden width of an expert.
"""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """SwiGLU experts: ``down(silu(x gate) * (x up))``, without biases.

    Attributes:
      gate_up_ED2F: gate (index 0 of the third axis) and up (index 1) projections in one array, so
        that they are one matrix product, and so that F can be sharded.
      down_EFD: output projection.
    """

    gate_up_ED2F: Float[Array, "E D 2 F"]
    down_EFD: Float[Array, "E F D"]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_EFD.shape[0]

    @property
    def hidden_width(self) -> int:
        """F."""
        return self.down_EFD.shape[1]


def swiglu(gate_up_R2F: Float[Array, "*R 2 F"]) -> Float[Array, "*R F"]:
    """silu(gate) * up of the two halves of the second last axis."""
    return jax.nn.silu(gate_up_R2F[..., 0, :]) * gate_up_R2F[..., 1, :]
