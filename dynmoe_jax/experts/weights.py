"""Parameters of all experts of one layer, and SwiGLU.

Axis legend: N layers, E experts, D model width, F hidden width of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedView:
    """Position of a layer's experts in the arrays of all layers.

    XLA copies a layer out of the stack for whoever reads it.  A kernel that reads the stack itself
    spares that, and the memory of the copy.

    Attributes:
      gate_up_NED2F: of all layers.
      down_NEFD: of all layers.
      layer: which one.
    """

    gate_up_NED2F: Float[Array, "N E D 2*F"]
    down_NEFD: Float[Array, "N E F D"]
    layer: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """SwiGLU experts: ``down(silu(x gate) * (x up))``, without biases.

    Attributes:
      gate_up_ED2F: gate projections (the first F columns) and up projections in one array, so that
        they are one matrix product.  (As [E, D, 2, F] a TPU lays it out in tiles of two rows, which
        no product takes, so that much of a step is copying; docs/measurements.md:
        v5p-expert-layout)
      down_EFD: output projection.
      stacked: the same numbers in place, for kernels that read them there; gradients go to the
        other two arrays.
    """

    gate_up_ED2F: Float[Array, "E D 2*F"]
    down_EFD: Float[Array, "E F D"]
    stacked: StackedView | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down_EFD.shape[0]

    @property
    def hidden_width(self) -> int:
        """F."""
        return self.down_EFD.shape[1]


def gated(gate_RF: Float[Array, "*R F"], up_RF: Float[Array, "*R F"]) -> Float[Array, "*R F"]:
    """SwiGLU (arXiv 2002.05202) of gate and up activations: silu(gate) * up."""
    return jax.nn.silu(gate_RF) * up_RF


def swiglu(gate_up_R2F: Float[Array, "*R 2*F"]) -> Float[Array, "*R F"]:
    """:func:`gated` of the two halves of the last axis."""
    return gated(*jnp.split(gate_up_R2F, 2, axis=-1))
