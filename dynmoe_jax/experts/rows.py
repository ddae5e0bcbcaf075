"""Rows: the (token, expert) pairs of a layer, sorted by expert.  The currency of expert compute.

Axis legend: T tokens, K slots per token, E experts, R rows (a static bound).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynmoe_jax.experts.permute import take
from dynmoe_jax.routing import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots of the routing of T tokens, as expert compute needs them: the experts, and their
    weights.

    Attributes:
      expert_TK: expert of each slot; ``num_experts`` means "no expert".
      weight_TK: combine weight of each slot.
      num_experts: E.
    """

    expert_TK: Int[Array, "T K"]
    weight_TK: Float[Array, "T K"]
    num_experts: int = dataclasses.field(metadata={"static": True})

    @property
    def used_TK(self) -> Bool[Array, "T K"]:
        """Whether a slot holds an expert."""
        return self.expert_TK < self.num_experts

    def among(self, first: Int[Array, ""] | int, count: int) -> "Slots":
        """The slots of ``count`` experts from number ``first`` on, which is then number 0.

        A token has at most ``count`` of them, so there are as many slots: the used ones come
        first.
        """
        here_TK = self.expert_TK - first
        # Both sides: "no expert" lies above the last one, and must not become one of these.
        mine_TK = (here_TK >= 0) & (here_TK < count) & self.used_TK
        if count >= self.expert_TK.shape[-1]:
            weight_TK = jnp.where(mine_TK, self.weight_TK, 0)
            return Slots(jnp.where(mine_TK, here_TK, count), weight_TK, count)
        slot_TK = jnp.cumsum(mine_TK, axis=-1) - 1
        # Sums over one-hot slots, not a sort: K is small, and backward needs no scatter.
        to_TKk = mine_TK[..., None] & (slot_TK[..., None] == jnp.arange(count))
        expert_Tk = jnp.sum(jnp.where(to_TKk, here_TK[..., None] - count, 0), axis=-2) + count
        weight_Tk = jnp.sum(jnp.where(to_TKk, self.weight_TK[..., None], 0), axis=-2)
        return Slots(expert_Tk, weight_Tk, count)


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
      share: of the experts that the tokens could choose, those that these rows are for; 1 unless
        other devices have the others.  An estimate, for sizes that only have to be usual ones.
    """

    token_R: Int[Array, "R"]
    weight_R: Float[Array, "R"]
    group_size_E: Int[Array, "E"]
    dropped: Int[Array, ""]
    row_TK: Int[Array, "T K"] | None = None
    share: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def used_R(self) -> Bool[Array, "R"]:
        """False for padding rows."""
        return jnp.arange(self.token_R.shape[0]) < jnp.sum(self.group_size_E)

    @property
    def expert_R(self) -> Int[Array, "R"]:
        """Expert of each row; E for padding."""
        end_E = jnp.cumsum(self.group_size_E)
        return jnp.searchsorted(end_E, jnp.arange(self.token_R.shape[0]), side="right")

    def kept(self, tokens: int, rows_per_token: float) -> int:
        """S, of how many rows something is kept for backward: ``rows_per_token`` for T tokens.

        Fewer where these rows are for a share of the experts, and R at most.
        """
        return min(self.token_R.shape[0], math.ceil(rows_per_token * self.share * tokens))

    @property
    def start_E(self) -> Int[Array, "E"]:
        """First row of each expert."""
        return jnp.cumsum(self.group_size_E) - self.group_size_E


def rows_from_routing(routing: Routing) -> Rows:
    """Lays out the (token, expert) pairs of a routing of T tokens, sorted by expert; R = T K."""
    return rows_from_slots(slots_of(routing), routing.expert_TK.size)


def slots_of(routing: Routing) -> Slots:
    """The slots of a routing."""
    return Slots(routing.expert_TK, routing.weight_TK, routing.num_experts)


def rows_from_slots(slots: Slots, bound: int) -> Rows:
    """Lays out the used slots of T tokens, of which there are at most ``bound``, by expert."""
    tokens, width = slots.expert_TK.shape
    row_TK, group_size_E = _row_positions(slots.expert_TK, slots.num_experts, bound)
    # The slot of each row; one past the last for padding.
    slot_R = jnp.full(bound, tokens * width, jnp.int32)
    slot_R = slot_R.at[row_TK.reshape(-1)].set(
        jnp.arange(tokens * width, dtype=jnp.int32), mode="drop", unique_indices=True
    )
    return Rows(
        token_R=jnp.where(slot_R < tokens * width, slot_R // width, 0),
        weight_R=take(slots.weight_TK.reshape(-1), slot_R, row_TK.reshape(-1)),
        group_size_E=group_size_E,
        dropped=jnp.zeros((), jnp.int32),
        row_TK=row_TK,
    )


def _row_positions(
    expert_TK: Int[Array, "T K"], num_experts: int, bound: int
) -> tuple[Int[Array, "T K"], Int[Array, "E"]]:
    """(row of each slot, rows of each expert); R for a slot without an expert.

    Counted, not sorted: no token has an expert twice, so the position of a token among those of an
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
