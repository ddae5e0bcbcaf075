"""Mixed values of attention, of some tokens."""

import dataclasses

from dynmoe_jax.calibration.statistics.statistic import STATISTICS, LayerStatistic


@STATISTICS.register("attention_mixed_samples")
@dataclasses.dataclass(frozen=True)
class AttentionMixedSamples(LayerStatistic):
    """The mixed values of all heads, which one matrix puts back into the residual stream."""

    axes = "SHW"
    form = "sample"

    def exists(self, layer):
        """Holds in every layer."""
        return True

    def of_layer(self, seen):
        """Picks the sampled tokens."""
        mixed_SX = seen.sampled(seen.mixed_TX)
        return mixed_SX.reshape(len(mixed_SX), -1, seen.layer.attention.width)
