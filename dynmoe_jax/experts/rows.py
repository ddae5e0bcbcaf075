"""Rows: the (token, expert) pairs of a layer, sorted by expert.  The currency of expert compute.

Axis legend: T tokens, K slots per token, E experts, R rows (a static bound).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Work for the experts of one layer.

    The rows of expert 0 come first, then those of expert 1, and so on; within an expert they are
    in the order of the tokens, and no token stands twice.  Rows beyond ``sum(group_size_E)`` are
    padding: their contents mean nothing and no backend may read them.

    Attributes:
      token_R: token of each row.
      weight_R: combine weight of each row, float32.
      group_size_E: rows of each expert.
      dropped: rows that the budget left out.
      row_TK: the rows of each token, in no order; R where there is none.  None if it is not known,
        as when experts choose tokens, and a token may have any number of rows.
    """

    token_R: Int[Array, "R"]
    weight_R: Float[Array, "R"]
    group_size_E: Int[Array, "E"]
    dropped: Int[Array, ""]
    row_TK: Int[Array, "T K"] | None = None

    @property
    def used_R(self) -> Bool[Array, "R"]:
        """False for padding rows."""
        return jnp.arange(self.token_R.shape[0]) < jnp.sum(self.group_size_E)

    @property
    def expert_R(self) -> Int[Array, "R"]:
        """Expert of each row; E for padding."""
        end_E = jnp.cumsum(self.group_size_E)
        return jnp.searchsorted(end_E, jnp.arange(self.token_R.shape[0]), side="right")

    @property
    def start_E(self) -> Int[Array, "E"]:
        """First row of each expert."""
        return jnp.cumsum(self.group_size_E) - self.group_size_E


def row_bound(tokens: int, slots: int, rows_per_token: float) -> int:
    """R: how many rows to lay out for T tokens of at most K experts under a budget (0 = none)."""
    everything = tokens * slots
    return min(everything, math.ceil(tokens * rows_per_token)) if rows_per_token else everything


def rows_from_routing(routing: Routing, rows_per_token: float = 0.0) -> Rows:
    """Lays out the (token, expert) pairs of a routing, sorted by expert.

    Args:
      routing: the routing of T tokens.
      rows_per_token: a budget that bounds R at ``ceil(T * rows_per_token)``.  If more pairs were
        chosen, the least probable ones are dropped and counted; whether a pair is kept then
        depends on all T tokens, later ones included.  0 = no budget, R = T * K.
    """
    tokens, slots = routing.expert_TK.shape
    bound = row_bound(tokens, slots, rows_per_token)
    expert_TK = routing.expert_TK
    if bound < tokens * slots:
        expert_TK = jnp.where(_most_probable(routing, bound), expert_TK, routing.num_experts)
    row_TK, group_size_E = _places(expert_TK, routing.num_experts, bound)
    # The slot of each row; one past the last for padding.
    slot_R = jnp.full(bound, tokens * slots, jnp.int32)
    slot_R = slot_R.at[row_TK.reshape(-1)].set(
        jnp.arange(tokens * slots, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    weight_R = (
        routing.weight_TK.reshape(-1).at[slot_R].get(mode="fill", fill_value=0, unique_indices=True)
    )
    return Rows(
        token_R=jnp.where(slot_R < tokens * slots, slot_R // slots, 0),
        weight_R=weight_R,
        group_size_E=group_size_E,
        dropped=jnp.sum(routing.used_TK, dtype=jnp.int32) - jnp.sum(group_size_E),
        row_TK=row_TK,
    )


def _places(
    expert_TK: Int[Array, "T K"], num_experts: int, bound: int
) -> tuple[Int[Array, "T K"], Int[Array, "E"]]:
    """(row of each slot, rows of each expert); R for a slot without an expert.

    Counted, not sorted: no token has an expert twice, so the place of a token among those of an
    expert is the number of earlier tokens that chose it.
    """
    chosen_TE = jnp.any(expert_TK[..., None] == jnp.arange(num_experts), axis=1)
    until_TE = jnp.cumsum(chosen_TE, axis=0, dtype=jnp.int32)
    group_size_E = until_TE[-1]
    start_E = jnp.cumsum(group_size_E) - group_size_E
    row_TE = start_E + until_TE - 1
    safe_TK = jnp.minimum(expert_TK, num_experts - 1)
    row_TK = jnp.take_along_axis(row_TE, safe_TK, axis=1)
    return jnp.where(expert_TK < num_experts, row_TK, bound), group_size_E


def _most_probable(routing: Routing, bound: int) -> Bool[Array, "T K"]:
    """Whether a slot is among the ``bound`` most probable ones."""
    safe_TK = jnp.minimum(routing.expert_TK, routing.num_experts - 1)
    prob_TK = jnp.take_along_axis(routing.probs_TE, safe_TK, axis=-1)
    score_S = jnp.where(routing.used_TK, prob_TK, -1.0).reshape(-1)
    _, kept_R = jax.lax.top_k(jax.lax.stop_gradient(score_S), bound)
    kept_S = jnp.zeros(score_S.shape, bool).at[kept_R].set(True, unique_indices=True)
    return kept_S.reshape(prob_TK.shape)
