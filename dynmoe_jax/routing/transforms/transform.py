"""Interface of transforms, which change a routing before experts compute, and their registry.

Axis legend: T tokens, E experts, K slots per token.
"""

import abc
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from dynmoe_jax.routing.record import Routing
from dynmoe_jax.routing.router import RouterInput


class Transform(abc.ABC):
    """A change of a routing: a frozen dataclass whose fields are its settings.

    Transforms follow each other in the order of ``config.model.moe.transforms``; losses and
    statistics read the routing before them, experts the one behind.

    Attributes:
      causal: whether what a token keeps is independent of later tokens.
      group: the tokens that one decision looks at: ``"token"``, or ``"device"``: those of one
        device (and microbatch), so that the mesh matters.
    """

    causal: ClassVar[bool] = True
    group: ClassVar[str] = "token"

    @abc.abstractmethod
    def __call__(self, routing: Routing, given: RouterInput) -> Routing:
        """The routing that experts compute; used slots first, as any routing promises."""

    def row_bound(self, tokens: int, rows: int, num_experts: int) -> int:
        """Most (token, expert) pairs of T tokens, given that they were at most ``rows`` before."""
        return rows


def dropped(before: Routing, after: Routing) -> Int[Array, ""]:
    """(token, expert) pairs that a transform left out."""
    return jnp.sum(before.used_TK, dtype=jnp.int32) - jnp.sum(after.used_TK, dtype=jnp.int32)


def chain(transforms: tuple[Any, ...], routing: Routing, given: RouterInput) -> Routing:
    """The routing behind several transforms."""
    for transform in transforms:
        routing = transform(routing, given)
    return routing
