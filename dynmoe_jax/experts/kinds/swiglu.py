"""SwiGLU experts (arXiv 2002.05202), the kind that kernels know."""

import dataclasses

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.experts.layer_cost import expert_flops
from dynmoe_jax.experts.weights import ExpertWeights, swiglu
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

    def apply(self, weights, x_RD):
        """Computes rows of one expert."""
        return swiglu(x_RD @ weights["gate_up_ED2F"]) @ weights["down_EFD"]

    def flops_per_row(self, width, hidden_width):
        """Counts gate, up and down."""
        return expert_flops(1, width, hidden_width)
