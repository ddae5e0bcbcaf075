"""Experts with a squared ReLU between two matrices (Primer, arXiv 2109.08668)."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.experts.kinds.two_matrices import TwoMatrices
from dynmoe_jax.registry import EXPERTS


@EXPERTS.register("squared_relu")
@dataclasses.dataclass(frozen=True)
class SquaredReLU(TwoMatrices):
    """``down(relu(x up)^2)``, without biases."""

    degree = 3
    homogeneous = True

    def between(self, hidden_RF):
        """Computes relu(x)^2."""
        return jnp.square(jax.nn.relu(hidden_RF))
