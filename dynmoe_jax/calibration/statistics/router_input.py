"""Inputs of the router, of some tokens."""

import dataclasses

from dynmoe_jax.calibration.statistics.ffn_input_samples import FeedForwardInputSamples
from dynmoe_jax.calibration.statistics.statistic import STATISTICS


@STATISTICS.register("router_input")
@dataclasses.dataclass(frozen=True)
class RouterInputSamples(FeedForwardInputSamples):
    """The normed residual stream, which the router reads as the experts do."""

    def exists(self, layer):
        """Holds in layers with experts."""
        return layer.is_moe
