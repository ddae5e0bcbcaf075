"""One pass of text through a model on disk, layers outside and batches inside, and what is learned
from it."""

from dynmoe_jax.calibration.domains import DomainSums, HeldOutSums, heldout_by_domain
from dynmoe_jax.calibration.gathering import gather
from dynmoe_jax.calibration.logits import LogitStatistics, logit_statistics
from dynmoe_jax.calibration.pricing import Price, price
from dynmoe_jax.calibration.statistics import STATISTICS
from dynmoe_jax.calibration.store import Statistics
from dynmoe_jax.calibration.stream import forward

__all__ = [
    "STATISTICS",
    "DomainSums",
    "HeldOutSums",
    "LogitStatistics",
    "Price",
    "Statistics",
    "forward",
    "gather",
    "heldout_by_domain",
    "logit_statistics",
    "price",
]
