"""SwiGLU experts (arXiv 2002.05202), the kind that kernels know."""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.experts.layer_cost import expert_flops
from dynmoe_jax.experts.weights import ExpertWeights, gated
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import Parameter


@EXPERTS.register("swiglu")
@dataclasses.dataclass(frozen=True)
class SwiGLU(ExpertKind):
    """``down(silu(x gate) * (x up))``, without biases."""

    stored_dense = True
    splits_hidden = True
    degree = 3

    def parameters(self, width, num_experts, hidden_width):
        """Gate and up side by side, and down."""
        return {
            "gate_up_ED2F": Parameter((num_experts, width, 2 * hidden_width)),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
        }

    def dense(self, weights):
        """The parameters themselves."""
        return ExpertWeights(weights["gate_up_ED2F"], weights["down_EFD"])

    def hidden(self, weights, x_RD):
        """Computes the gate, and silu(gate) * up."""
        gate_RF, up_RF = jnp.split(x_RD @ weights["gate_up_ED2F"], 2, axis=-1)
        return gate_RF, gated(gate_RF, up_RF)

    def output(self, weights, hidden_RF):
        """Multiplies by the last matrix."""
        return hidden_RF @ weights["down_EFD"]

    def apply(self, weights, x_RD):
        """Computes rows of one expert."""
        return self.output(weights, self.hidden(weights, x_RD)[1])

    def flops_per_row(self, width, hidden_width):
        """Counts gate, up and down."""
        return expert_flops(1, width, hidden_width)
