"""Outputs of the router, of some tokens."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, LayerStatistic


@STATISTICS.register("router_output")
@dataclasses.dataclass(frozen=True)
class RouterOutputSamples(LayerStatistic):
    """The router's logits, of the same tokens as ``router_input``."""

    axes = "SX"
    form = "sample"

    def exists(self, layer):
        """Holds in layers with experts."""
        return layer.is_moe

    def of_layer(self, seen):
        """Picks the sampled tokens."""
        return seen.sampled(seen.output.routing.logits_TE)
