"""ReGLU experts, SwiGLU's with a ReLU (arXiv 2002.05202).

Axis legend: E experts, R rows of one expert, D model width, F hidden width of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.experts.layer_cost import expert_flops
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import Parameter


@EXPERTS.register("reglu")
@dataclasses.dataclass(frozen=True)
class ReGLU(ExpertKind):
    """``down(relu(x gate) * (x up))``, without biases."""

    splits_hidden = True
    degree = 3
    homogeneous = True

    def parameters(self, width, num_experts, hidden_width):
        """Gate and up side by side, and down."""
        return {
            "gate_up_ED2F": Parameter((num_experts, width, 2 * hidden_width)),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
        }

    def hidden(self, weights, x_RD):
        """Computes the gate, and relu(gate) * up."""
        gate_RF, up_RF = jnp.split(x_RD @ weights["gate_up_ED2F"], 2, axis=-1)
        return gate_RF, jax.nn.relu(gate_RF) * up_RF

    def output(self, weights, hidden_RF):
        """Multiplies by the last matrix."""
        return hidden_RF @ weights["down_EFD"]

    def apply(self, weights, x_RD):
        """Computes rows of one expert."""
        return self.output(weights, self.hidden(weights, x_RD)[1])

    def flops_per_row(self, width, hidden_width):
        """Counts gate, up and down."""
        return expert_flops(1, width, hidden_width)
