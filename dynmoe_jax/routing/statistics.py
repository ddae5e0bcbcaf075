"""Statistics of routing that are logged and plotted."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.routing.record import Routing


def load_imbalance(
    load_E: Int[np.ndarray, "*N E"], exists_E: Bool[np.ndarray, "*N E"] | bool = True
) -> Float[np.ndarray, "*N"]:
    """Load of the busiest expert over the mean load; 1 is perfect, E is total collapse.

    On the host: on the device it would wait for the step that is under way there.

    Args:
      load_E: tokens that chose each expert.
      exists_E: False where a layer has no such expert.
    """
    mean = np.mean(load_E, axis=-1, where=exists_E)
    return np.max(load_E, axis=-1) / np.maximum(mean, 1e-9)


def unused_experts(
    load_E: Int[np.ndarray, "*N E"], exists_E: Bool[np.ndarray, "*N E"] | bool = True
) -> int:
    """Experts that no token chose, over all layers; on the host, too.  Arguments as above."""
    return int(np.sum((load_E == 0) & exists_E))


def existing_experts(experts_N: Sequence[int], most: int) -> Bool[np.ndarray, "N E"]:
    """Whether each layer has so many experts; ``most`` is the E of the arrays."""
    return np.arange(most) < np.asarray(experts_N)[:, None]


def count_histogram(routing: Routing, valid_T: Bool[Array, "T"]) -> Int[Array, "*N K+1"]:
    """Valid tokens by the number of experts they use, 0 to K."""
    counts_K = jnp.arange(routing.slots + 1)
    same = (routing.experts_per_token_T[..., None] == counts_K) & valid_T[:, None]
    return jnp.sum(same, axis=-2, dtype=jnp.int32)
