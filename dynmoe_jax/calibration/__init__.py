"""One pass of text through a model on disk, layers outside and batches inside, and what is learned
from it."""

from dynmoe_jax.calibration.domains import DomainSums, HeldOutSums, heldout_by_domain
from dynmoe_jax.calibration.logits import LogitStatistics, logit_statistics
from dynmoe_jax.calibration.stream import forward

__all__ = [
    "DomainSums",
    "HeldOutSums",
    "LogitStatistics",
    "forward",
    "heldout_by_domain",
    "logit_statistics",
]
