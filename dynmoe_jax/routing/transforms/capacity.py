"""Capacity: an expert takes at most so many tokens, and drops the others (GShard, Switch).

Unlike the backend of that name it computes no empty slots: any dropless backend computes what is
left.

Axis legend: T tokens, E experts, K slots per token, C places of one expert.
"""

import dataclasses
import math

import jax.numpy as jnp

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import TRANSFORMS
from dynmoe_jax.routing.record import Routing, used_first
from dynmoe_jax.routing.transforms.transform import Transform


@TRANSFORMS.register("capacity")
@dataclasses.dataclass(frozen=True)
class Capacity(Transform):
    """Keeps the first C choices of each expert among the tokens of a device.

    By ``"choice"``, all first choices come before any second one (GShard, arXiv 2006.16668,
    algorithm 1), so that a later token's first choice may displace an earlier one's second.  By
    ``"token"``, all choices of a token come before those of the next (Switch, arXiv 2101.03961).
    A dropped choice contributes nothing; the others keep their weights.
    """

    factor: float = free_setting(
        1.25, "places of an expert, as a multiple of T / E, T the tokens of a device", above=0.0
    )
    minimum: int = free_setting(4, "places that an expert has at the least", low=1)
    priority: str = free_setting(
        "choice", "who comes first where places are few", choices=("choice", "token")
    )
    group = "device"

    @property
    def causal(self) -> bool:
        """Whether later tokens cannot displace earlier ones."""
        return self.priority == "token"

    def places(self, tokens: int, num_experts: int) -> int:
        """C."""
        return min(tokens, max(self.minimum, math.ceil(self.factor * tokens / num_experts)))

    def row_bound(self, tokens: int, rows: int, num_experts: int) -> int:
        """E C at most."""
        return min(rows, num_experts * self.places(tokens, num_experts))

    def __call__(self, routing: Routing, given) -> Routing:
        """Drops what finds no place."""
        tokens, slots = routing.expert_TK.shape
        by_choice = self.priority == "choice"
        expert_SS = routing.expert_TK.T if by_choice else routing.expert_TK
        expert_S = expert_SS.reshape(-1)
        chosen_SE = expert_S[:, None] == jnp.arange(routing.num_experts)
        before_SE = jnp.cumsum(chosen_SE, axis=0, dtype=jnp.int32) - chosen_SE
        place_S = jnp.sum(jnp.where(chosen_SE, before_SE, 0), axis=-1)
        kept_S = place_S < self.places(tokens, routing.num_experts)
        kept_TK = kept_S.reshape(slots, tokens).T if by_choice else kept_S.reshape(tokens, slots)
        kept_TK &= routing.used_TK
        return used_first(
            dataclasses.replace(
                routing,
                expert_TK=jnp.where(kept_TK, routing.expert_TK, routing.num_experts),
                weight_TK=jnp.where(kept_TK, routing.weight_TK, 0.0),
            )
        )
