"""Normalized router logits: the same distribution however large the logits are.

Skywork-MoE (arXiv 2406.06563, section 3.1), with a fixed scale; DTop-p (arXiv 2512.13996), with one
that each layer learns.

Axis legend: T tokens, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dynmoe_jax.routing.record import alive

EPSILON = 1e-6
"""Added to the standard deviation."""


def normalized_logits(
    logits_TE: Float[Array, "*T E"], scale: Float[Array, ""] | float
) -> Float[Array, "*T E"]:
    """Returns scale (z - mean z) / (std z + epsilon), over the experts of each token, in float32.

    A token whose logits are all equal gets zeros, and no gradient but a finite one.  Logits of
    experts that it may not choose stay what they are, and count nowhere.

    Args:
      logits_TE: of tokens; padding must not hold NaN any more, see
        :func:`dynmoe_jax.routing.record.masked_logits`.
      scale: standard deviation of what is returned.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    alive_TE = alive(logits_TE)
    count_T1 = jnp.maximum(jnp.sum(alive_TE, axis=-1, keepdims=True), 1)

    def mean(value_TE):
        return jnp.sum(jnp.where(alive_TE, value_TE, 0.0), axis=-1, keepdims=True) / count_T1

    centered_TE = jnp.where(alive_TE, logits_TE - mean(logits_TE), 0.0)
    variance_T1 = mean(jnp.square(centered_TE))
    # The root has no slope at 0, where padding is.
    even_T1 = variance_T1 == 0
    deviation_T1 = jnp.where(even_T1, 0.0, jnp.sqrt(jnp.where(even_T1, 1.0, variance_T1)))
    normalized_TE = scale * centered_TE / (deviation_T1 + EPSILON)
    return jnp.where(alive_TE, normalized_TE, logits_TE)
