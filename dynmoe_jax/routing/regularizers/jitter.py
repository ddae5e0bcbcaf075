"""Input jitter: noise on the tokens that a router reads (Switch, arXiv 2101.03961).

Axis legend: T tokens, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import REGULARIZERS
from dynmoe_jax.routing.regularizers.regularizer import Regularizer
from dynmoe_jax.routing.router import RouterInput

_PURPOSE = 0x6A697474
"""Tells its draws from those of a router."""


@REGULARIZERS.register("jitter")
@dataclasses.dataclass(frozen=True)
class Jitter(Regularizer):
    """The router reads x u in place of x, u uniform in [1 - epsilon, 1 + epsilon].

    Every entry of every token has a u of its own; what experts compute is x itself.
    """

    epsilon: float = free_setting(1e-2, "half the width of the noise", low=0.0, high=1.0)
    reads = frozenset({"noise"})

    def __call__(self, given: RouterInput, scores) -> RouterInput:
        """Disturbs the tokens, and scores them again."""
        # Padding may hold NaN, and 0 * NaN is NaN.
        x_TD = jnp.where(given.valid_T[:, None], given.x_TD, 0).astype(jnp.float32)
        span = (x_TD.shape[-1],), jnp.float32, 1 - self.epsilon, 1 + self.epsilon
        x_TD = x_TD * given.draws(lambda key: jax.random.uniform(key, *span), _PURPOSE)
        return dataclasses.replace(given, x_TD=x_TD, logits_TE=scores(x_TD))
