"""Experts with a GELU between two matrices (arXiv 1606.08415)."""

import dataclasses

import jax

from dynmoe_jax.experts.kinds.two_matrices import TwoMatrices
from dynmoe_jax.registry import EXPERTS


@EXPERTS.register("gelu")
@dataclasses.dataclass(frozen=True)
class GELU(TwoMatrices):
    """``down(gelu(x up))``, without biases, and with the error function itself."""

    def between(self, hidden_RF):
        """Computes x Phi(x), Phi the distribution function of N(0, 1)."""
        return jax.nn.gelu(hidden_RF, approximate=False)
