"""Guard within a step against numbers that are not finite and losses that jump.

It is counted on the device, inside the step, and is part of the state: nothing waits for the host,
and a run that goes on from a checkpoint judges the next loss as the run that never stopped.

``optax.apply_if_finite`` is not used: after n updates in a row that it left out it applies the next
one, bad as it is, and it reads all gradients once more, whose norm is there already.

Axis legend: W steps that are remembered.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax import config

WINDOW = 128
"""W: losses that a new one is compared with."""

FEWEST_LOSSES = 32
"""With fewer losses than these nothing is a spike: the spread of a handful is chance."""

LEAST_RISE = 0.05
"""A spike is at least this share above the median: where losses hardly vary, any deviation would
be many of theirs."""

_DEVIATION_OF_MAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """State of the guard, kept from step to step.

    Attributes:
      skipped: updates left out so far.
      skipped_in_a_row: those among the newest steps.
      recent_W: the newest finite losses, the last one at the end; NaN where there is none yet.
      spike_steps: the newest steps in a row whose loss lay above the bound.
    """

    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    recent_W: Float[Array, "W"]
    spike_steps: Int[Array, ""]


def new_guard() -> Guard:
    """Before the first step."""
    return Guard(jnp.int32(0), jnp.int32(0), jnp.full(WINDOW, jnp.nan, jnp.float32), jnp.int32(0))


def with_other_text(guard: Guard, begins: Bool[Array, ""]) -> Guard:
    """The guard where other text begins: losses of what was learned before are no measure."""
    return dataclasses.replace(
        guard,
        recent_W=jnp.where(begins, jnp.nan, guard.recent_W),
        spike_steps=jnp.where(begins, 0, guard.spike_steps),
    )


def spike_bound(recent_W: Float[Array, "W"], deviations: float) -> Float[Array, ""]:
    """The loss above which a step is suspect: median + deviations * 1.4826 * MAD.

    Median and median absolute deviation, because a few wild losses move neither.

    Args:
      recent_W: losses, NaN where there is none.
      deviations: robust standard deviations above the median.

    Returns:
      the bound, infinite while there are fewer than ``FEWEST_LOSSES``.
    """
    median = jnp.nanmedian(recent_W)
    spread = _DEVIATION_OF_MAD * jnp.nanmedian(jnp.abs(recent_W - median))
    bound = median + jnp.maximum(deviations * spread, LEAST_RISE * jnp.abs(median))
    return jnp.where(jnp.sum(jnp.isfinite(recent_W)) < FEWEST_LOSSES, jnp.inf, bound)


def watch(
    guard: Guard, loss: Float[Array, ""], grad_norm: Float[Array, ""], train: config.Train
) -> tuple[Bool[Array, ""], Guard]:
    """(whether to update, what to remember) after the gradients of a step.

    A norm is not finite if any gradient is not, so that one number tells.  After
    ``train.max_skipped_in_a_row`` nothing is updated any more: the host, which reads one step
    late, then finds the very parameters that failed.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    update = finite & (guard.skipped_in_a_row < train.max_skipped_in_a_row)
    skipped = jnp.where(update, 0, 1)
    above = loss > spike_bound(guard.recent_W, train.spike_deviations)
    remembered = Guard(
        skipped=guard.skipped + skipped,
        skipped_in_a_row=(guard.skipped_in_a_row + 1) * skipped,
        recent_W=jnp.where(finite, jnp.append(guard.recent_W[1:], loss), guard.recent_W),
        spike_steps=jnp.where(finite, (guard.spike_steps + 1) * above, guard.spike_steps),
    )
    return update, remembered
