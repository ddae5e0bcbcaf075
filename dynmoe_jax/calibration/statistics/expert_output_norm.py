"""How long the outputs of experts are."""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic


@STATISTICS.register("expert_output_norm")
@dataclasses.dataclass(frozen=True)
class ExpertOutputNorm(UnitStatistic):
    """Mean norm of what an expert gives a token, before it is weighed."""

    axes = ""

    def exists(self, layer):
        """Holds in layers with experts."""
        return layer.is_moe and super().exists(layer)

    def flops_per_row(self, width, hidden_width):
        """Counts the squares."""
        return 2.0 * width

    def of_rows(self, rows):
        """Adds up norms."""
        norm_R1 = jnp.linalg.norm(rows.output_RD.astype(jnp.float32), axis=-1, keepdims=True)
        return rows.summed(norm_R1)[0]
