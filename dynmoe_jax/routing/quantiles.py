"""Quantiles of numbers in [0, 1] that are counted in bins, so that they add up over devices.

Axis legend: T tokens, M numbers of a token, E experts, B bins.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BINS = 1000


def histogram(value_TM: Float[Array, "T M"], valid_T: Bool[Array, "T"]) -> Int[Array, "B"]:
    """Numbers of the valid tokens by bin."""
    bin_TM = jnp.clip((value_TM * BINS).astype(jnp.int32), 0, BINS - 1)
    counted_TM = jnp.broadcast_to(valid_T[:, None], bin_TM.shape).astype(jnp.int32)
    return jnp.zeros(BINS, jnp.int32).at[bin_TM].add(counted_TM)


def histograms(value_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]) -> Int[Array, "E B"]:
    """Numbers of the valid tokens by expert and bin."""
    experts = value_TE.shape[-1]
    # Compared before the cast, which of NaN or of something large gives anything.
    bin_TE = jnp.clip(value_TE * BINS, 0, BINS - 1).astype(jnp.int32)
    counted_T1 = valid_T[:, None].astype(jnp.int32)
    nothing_EB = jnp.zeros((experts, BINS), jnp.int32)
    return nothing_EB.at[jnp.arange(experts), bin_TE].add(counted_T1)


def quantile(count_B: Float[Array, "B"], share: float, upper: bool = False) -> Float[Array, ""]:
    """The number that ``share`` of all are below, linear within a bin.

    Args:
      count_B: numbers by bin.
      share: of them.
      upper: of a gap between two numbers that both do, the upper end.
    """
    until_B = jnp.cumsum(count_B.astype(jnp.float32))
    wanted = share * until_B[-1]
    bin_ = jnp.argmax(until_B > wanted if upper else until_B >= wanted)
    before = until_B[bin_] - count_B[bin_]
    inside = (wanted - before) / jnp.maximum(count_B[bin_], 1)
    return (bin_ + jnp.clip(inside, 0, 1)) / count_B.shape[0]
