"""Dynamic batch loading: more text of the domains whose loss exceeds a reference.

Sheared LLaMA (arXiv 2310.06694, algorithm 1) begun it to recover a pruned model in all domains at
the same time; LLaMA-MoE (arXiv 2406.16554) compares it with weights that stay.
"""

import dataclasses
import math

from dynmoe_jax.data.reweighting.reweighting import Reweighting
from dynmoe_jax.fields import run_setting
from dynmoe_jax.registry import REWEIGHTINGS


@REWEIGHTINGS.register("dynamic_batch_loading")
@dataclasses.dataclass(frozen=True)
class DynamicBatchLoading(Reweighting):
    """Moves weights toward domains whose loss exceeds a reference.

    w <- w exp(rate (loss - reference)), normalized; then (1 - c) w + c / domains.
    """

    reference: str = run_setting(
        "",
        "held-out loss by domain, e.g. 'code=1.8,prose=2.9', or the folder of a finished run that "
        "has been evaluated",
    )
    rate: float = run_setting(1.0, "what differences of losses are multiplied by", above=0.0)
    smoothing: float = run_setting(
        1e-4, "share c of even weights that is mixed in", low=0.0, high=1.0
    )

    def __call__(self, weights, losses, reference):
        """The next weights."""
        excess = {name: self.rate * (losses[name] - reference[name]) for name in weights}
        # Less the largest: whatever the losses are, no weight overflows, and one is not 0.
        most = max(excess.values())
        moved = {name: weight * math.exp(excess[name] - most) for name, weight in weights.items()}
        total, even = sum(moved.values()), self.smoothing / len(moved)
        return {name: (1 - self.smoothing) * w / total + even for name, w in moved.items()}
