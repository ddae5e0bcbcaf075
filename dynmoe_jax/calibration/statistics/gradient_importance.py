"""How much the loss depends on each hidden unit."""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic


@STATISTICS.register("gradient_importance")
@dataclasses.dataclass(frozen=True)
class GradientImportance(UnitStatistic):
    """Mean of ``|h dL/dh|``: to first order, what the loss changes by without the unit, as
    LLaMA-MoE (arXiv 2406.16554) scores units.

    L is the sum of the negative log-likelihoods of all targets, so that the number of tokens of a
    batch does not matter.
    """

    axes = "F"
    needs = frozenset({"gradients"})

    def exists(self, layer):
        """Holds where hidden units are known, but for experts of soft slots, which mix tokens."""
        soft = layer.is_moe and not layer.model.moe.route.chooses
        return super().exists(layer) and not soft

    def flops_per_row(self, width, hidden_width):
        """Counts the product with the last matrix, transposed."""
        return 2.0 * width * hidden_width

    def of_rows(self, rows):
        """Adds up absolute products."""
        return rows.summed(jnp.abs(rows.hidden_RF * rows.gradient_RF))
