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
    expert_S = routing.expert_TK.reshape(-1)
    if bound < tokens * slots:
        kept_R = _most_probable(routing, bound)
        order_R = kept_R[jnp.argsort(expert_S[kept_R], stable=True)]
    else:
        order_R = jnp.argsort(expert_S, stable=True)
    sorted_R = expert_S[order_R]
    edge_E = jnp.searchsorted(sorted_R, jnp.arange(routing.num_experts + 1))
    weight_R = routing.weight_TK.reshape(-1).at[order_R].get(unique_indices=True)
    return Rows(
        token_R=(order_R // slots).astype(jnp.int32),
        weight_R=weight_R,
        group_size_E=jnp.diff(edge_E).astype(jnp.int32),
        dropped=jnp.sum(routing.used_TK, dtype=jnp.int32) - edge_E[-1].astype(jnp.int32),
        row_TK=_row_of_slot(order_R, edge_E[-1], tokens * slots).reshape(tokens, slots),
    )


def _row_of_slot(order_R: Int[Array, "R"], used: Int[Array, ""], slots: int) -> Int[Array, "TK"]:
    """The row of each slot, the inverse of ``order_R``; R for a slot that is empty or dropped."""
    bound = order_R.shape[0]
    row_R = jnp.arange(bound, dtype=jnp.int32)
    row_R = jnp.where(row_R < used, row_R, bound)
    return jnp.full(slots, bound, jnp.int32).at[order_R].set(row_R, unique_indices=True)


def _most_probable(routing: Routing, bound: int) -> Int[Array, "R"]:
    """The slots (in rising order) that hold the ``bound`` most probable pairs."""
    safe_TK = jnp.minimum(routing.expert_TK, routing.num_experts - 1)
    prob_TK = jnp.take_along_axis(routing.probs_TE, safe_TK, axis=-1)
    score_S = jnp.where(routing.used_TK, prob_TK, -1.0).reshape(-1)
    _, kept_R = jax.lax.top_k(jax.lax.stop_gradient(score_S), bound)
    return jnp.sort(kept_R)
