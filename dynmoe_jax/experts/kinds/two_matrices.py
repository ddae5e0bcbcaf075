"""Experts of two matrices with a function between them, which their kinds name.

Axis legend: E experts, R rows of one expert, D model width, F hidden width of an expert.
"""

import abc

from jaxtyping import Array, Float

from dynmoe_jax.experts.kinds.kind import ExpertKind
from dynmoe_jax.routing import Parameter


class TwoMatrices(ExpertKind):
    """``down(f(x up))``, without biases."""

    splits_hidden = True

    @abc.abstractmethod
    def between(self, hidden_RF: Float[Array, "R F"]) -> Float[Array, "R F"]:
        """Computes f, of each number by itself."""

    def parameters(self, width, num_experts, hidden_width):
        """Up and down."""
        return {
            "up_EDF": Parameter((num_experts, width, hidden_width)),
            "down_EFD": Parameter((num_experts, hidden_width, width)),
        }

    def hidden(self, weights, x_RD):
        """Computes x up, and f of it."""
        activation_RF = x_RD @ weights["up_EDF"]
        return activation_RF, self.between(activation_RF)

    def output(self, weights, hidden_RF):
        """Multiplies by the second matrix."""
        return hidden_RF @ weights["down_EFD"]

    def apply(self, weights, x_RD):
        """Computes rows of one expert."""
        return self.output(weights, self.hidden(weights, x_RD)[1])

    def flops_per_row(self, width, hidden_width):
        """Counts up and down."""
        return 4.0 * width * hidden_width
