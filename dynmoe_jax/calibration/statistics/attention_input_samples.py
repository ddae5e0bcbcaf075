"""Inputs of attention, of some tokens."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, LayerStatistic


@STATISTICS.register("attention_input_samples")
@dataclasses.dataclass(frozen=True)
class AttentionInputSamples(LayerStatistic):
    """The normed residual stream that queries, keys and values are made of."""

    axes = "SD"
    form = "sample"

    def exists(self, layer):
        """Holds in every layer."""
        return True

    def of_layer(self, seen):
        """Picks the sampled tokens."""
        return seen.sampled(seen.attention_input_TD)
