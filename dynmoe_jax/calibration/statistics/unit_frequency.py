"""How often each hidden unit is on."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, UnitStatistic


@STATISTICS.register("unit_frequency")
@dataclasses.dataclass(frozen=True)
class UnitFrequency(UnitStatistic):
    """Share of the tokens whose activation is above zero.

    The activation is what the nonlinear function is computed of: the gate of a gated feed-forward.
    """

    axes = "F"

    def of_rows(self, rows):
        """Counts the rows with an activation above zero."""
        return rows.summed(rows.activation_RF > 0)
