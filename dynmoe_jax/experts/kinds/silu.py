"""Experts with a SiLU between two matrices, as BlockFFN has them (arXiv 2507.08771)."""

import dataclasses

import jax

from dynmoe_jax.experts.kinds.two_matrices import TwoMatrices
from dynmoe_jax.registry import EXPERTS


@EXPERTS.register("silu")
@dataclasses.dataclass(frozen=True)
class SiLU(TwoMatrices):
    """``down(silu(x up))``, without biases."""

    def between(self, hidden_RF):
        """Computes silu(x)."""
        return jax.nn.silu(hidden_RF)
