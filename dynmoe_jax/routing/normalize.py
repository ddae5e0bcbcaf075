"""Normalized router logits: the same distribution however large the logits are.

Skywork-MoE (arXiv 2406.06563, section 3.1), with a fixed scale; DTop-p (arXiv 2512.13996), with one
that each layer learns.

Axis legend: T tokens, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6
"""Added to the standard deviation."""


def normalized_logits(
    logits_TE: Float[Array, "*T E"], scale: Float[Array, ""] | float
) -> Float[Array, "*T E"]:
    """Returns scale (z - mean z) / (std z + epsilon), over the experts of each token, in float32.

    A token whose logits are all equal gets zeros, and no gradient but a finite one.

    Args:
      logits_TE: of tokens; padding must not hold NaN any more, see
        :func:`dynmoe_jax.routing.record.masked_logits`.
      scale: standard deviation of what is returned.
    """
    logits_TE = logits_TE.astype(jnp.float32)
    centered_TE = logits_TE - jnp.mean(logits_TE, axis=-1, keepdims=True)
    variance_T1 = jnp.mean(jnp.square(centered_TE), axis=-1, keepdims=True)
    # The root has no slope at 0, where padding is.
    even_T1 = variance_T1 == 0
    deviation_T1 = jnp.where(even_T1, 0.0, jnp.sqrt(jnp.where(even_T1, 1.0, variance_T1)))
    return scale * centered_TE / (deviation_T1 + EPSILON)
