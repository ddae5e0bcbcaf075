"""Inputs of the feed-forward, of some tokens."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, LayerStatistic


@STATISTICS.register("ffn_input_samples")
@dataclasses.dataclass(frozen=True)
class FeedForwardInputSamples(LayerStatistic):
    """The normed residual stream that the feed-forward, dense or of experts, reads."""

    axes = "SD"
    form = "sample"

    def exists(self, layer):
        """Holds in every layer."""
        return True

    def of_layer(self, seen):
        """Picks the sampled tokens."""
        return seen.sampled(seen.input_TD)
