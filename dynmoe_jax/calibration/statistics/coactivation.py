"""Which hidden units are on together."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic


@STATISTICS.register("coactivation")
@dataclasses.dataclass(frozen=True)
class Coactivation(UnitStatistic):
    """Sum over tokens of ``relu(a_i) relu(a_j)``, of two hidden units' activations: weights of the
    graph that MoEfication cuts (arXiv 2110.01786)."""

    axes = "FF"
    form = "sum"

    def flops_per_row(self, width, hidden_width):
        """Counts the product of all pairs."""
        return 2.0 * hidden_width**2

    def of_rows(self, rows):
        """Multiplies the activations of all pairs."""
        on_RF = jax.nn.relu(rows.valid(rows.activation_RF))
        return jnp.einsum("ri,rj->ij", on_RF, on_RF, preferred_element_type=jnp.float32)
