"""How large each hidden unit is."""

import dataclasses

import jax.numpy as jnp

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic


@STATISTICS.register("unit_magnitude")
@dataclasses.dataclass(frozen=True)
class UnitMagnitude(UnitStatistic):
    """Mean absolute value of what goes into the last matrix, ``|h|``."""

    axes = "F"

    def of_rows(self, rows):
        """Adds up absolute values."""
        return rows.summed(jnp.abs(rows.hidden_RF))
