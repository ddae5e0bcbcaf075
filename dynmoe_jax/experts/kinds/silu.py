"""Experts with a SiLU between two matrices, as BlockFFN has them (arXiv 2507.08771)."""

import dataclasses

import jax

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.registry import EXPERTS
from dynmoe_jax.routing import Parameter


@EXPERTS.register("silu")
@dataclasses.dataclass(frozen=True)
class SiLU(ExpertKind):
    """``down(silu(x up))``, without biases."""

    splits_hidden = True

    def parameters(self, width, num_experts, hidden_width):
        """Up and down."""
        return {
            "up_EDF": Parameter((num_experts, width, hidden_width)),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
        }

    def apply(self, weights, x_RD):
        """Computes rows of one expert."""
        return jax.nn.silu(x_RD @ weights["up_EDF"]) @ weights["down_EFD"]

    def flops_per_row(self, width, hidden_width):
        """Counts up and down."""
        return 4.0 * width * hidden_width
