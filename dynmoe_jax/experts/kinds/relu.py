"""Experts with a ReLU between two matrices, the feed-forward of the first Transformer.

A hidden unit that is not positive adds nothing, which is what MoEfication (arXiv 2110.01786) and
FactorLLM (arXiv 2408.11855) make experts of.
"""

import dataclasses

import jax

from dynmoe_jax.experts.kinds.two_matrices import TwoMatrices
from dynmoe_jax.registry import EXPERTS


@EXPERTS.register("relu")
@dataclasses.dataclass(frozen=True)
class ReLU(TwoMatrices):
    """``down(relu(x up))``, without biases."""

    homogeneous = True

    def between(self, hidden_RF):
        """Computes relu(x)."""
        return jax.nn.relu(hidden_RF)
