"""How many tokens each expert computed."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, LayerStatistic


@STATISTICS.register("routed_tokens")
@dataclasses.dataclass(frozen=True)
class RoutedTokens(LayerStatistic):
    """Tokens, or slots, that each expert computed: of so many, its other statistics are made."""

    axes = "E"
    form = "sum"

    def exists(self, layer):
        """Holds in layers with experts."""
        return layer.is_moe

    def of_layer(self, seen):
        """Counts the rows."""
        return seen.rows.group_size_E
