"""Row budget: at most so many (token, expert) pairs for the tokens of a device.

Axis legend: T tokens, K slots per token, R rows, S = T K slots.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dynmoe_jax.fields import free_setting
from dynmoe_jax.registry import TRANSFORMS
from dynmoe_jax.routing.record import Routing, used_first
from dynmoe_jax.routing.transforms.transform import Transform


@TRANSFORMS.register("row_budget")
@dataclasses.dataclass(frozen=True)
class RowBudget(Transform):
    """The least probable choices are left out where there are more than the budget.

    Whether a slot is kept depends on all tokens of the device, later ones included.
    """

    rows_per_token: float = free_setting(
        2.0,
        "bound on the mean experts per token of a device's batch, whose least probable choices are "
        "then dropped (so tokens affect each other)",
        unit="rows/token",
        above=0.0,
        formerly=("model.moe.rows_per_token",),
    )
    causal = False
    group = "device"

    def row_bound(self, tokens: int, rows: int, num_experts: int) -> int:
        """R: the budget of T tokens."""
        return min(rows, math.ceil(tokens * self.rows_per_token))

    def __call__(self, routing: Routing, given) -> Routing:
        """Leaves out the least probable slots of the T tokens."""
        bound = self.row_bound(routing.expert_TK.shape[0], routing.expert_TK.size, 0)
        if bound == routing.expert_TK.size:
            return routing
        kept_TK = _most_probable(routing, bound)
        expert_TK = jnp.where(kept_TK, routing.expert_TK, routing.num_experts)
        weight_TK = jnp.where(kept_TK, routing.weight_TK, 0.0)
        return used_first(dataclasses.replace(routing, expert_TK=expert_TK, weight_TK=weight_TK))


def _most_probable(routing: Routing, bound: int) -> Bool[Array, "T K"]:
    """Whether a slot is among the ``bound`` most probable ones."""
    safe_TK = jnp.minimum(routing.expert_TK, routing.num_experts - 1)
    prob_TK = jnp.take_along_axis(routing.probs_TE, safe_TK, axis=-1)
    score_S = jnp.where(routing.used_TK, prob_TK, -1.0).reshape(-1)
    _, kept_R = jax.lax.top_k(jax.lax.stop_gradient(score_S), bound)
    kept_S = jnp.zeros(score_S.shape, bool).at[kept_R].set(True, unique_indices=True)
    return kept_S.reshape(prob_TK.shape)
