"""Records of what a router decides: the one currency between routers, losses and experts.

Axis legend (used in names everywhere): T tokens, E experts, K slots per token (a static bound), C
slots of one expert.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DEAD = -1e30
"""Logit of an expert that no token may choose, such as one that expert dropout takes out: its
probability is 0 exactly, and 0 times its logarithm is 0 as well."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Routing of T tokens: the experts that each uses, and the weights of their outputs.

    No token has an expert twice, and used slots come first, in the order of choice.

    Attributes:
      expert_TK: expert of each slot; E means "no expert", a slot that costs nothing.
      weight_TK: combine weight of each slot, float32, 0 in an empty slot.
      probs_TE: router scores, float32; the losses read these.  A router may score more than the
        experts, and has then more columns.
      logits_TE: router logits, float32, likewise.
      num_experts: E.
      free_T: weight of the token itself in the output, for experts that compute nothing (identity);
        None: there are none.
      extra: arrays of tokens, [T, ...], that a family's losses or free experts need, by name.
      most_rows: bound on the used slots of all T tokens together; 0: they may all be used.

    The leading axis may have more axes in front of it (a stack over layers, or [B, L] in place of
    T); everything here works on the trailing axes.
    """

    expert_TK: Int[Array, "*T K"]
    weight_TK: Float[Array, "*T K"]
    probs_TE: Float[Array, "*T E"]
    logits_TE: Float[Array, "*T E"]
    num_experts: int = dataclasses.field(metadata={"static": True})
    free_T: Float[Array, "*T"] | None = None
    extra: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    most_rows: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """K, the static bound on experts per token."""
        return self.expert_TK.shape[-1]

    @property
    def used_TK(self) -> Bool[Array, "*T K"]:
        """Whether a slot holds an expert."""
        return self.expert_TK < self.num_experts

    @property
    def experts_per_token_T(self) -> Int[Array, "*T"]:
        """Experts that each token uses; 0 for padding."""
        return jnp.sum(self.used_TK, axis=-1, dtype=jnp.int32)

    @property
    def chosen_TE(self) -> Bool[Array, "*T E"]:
        """Whether a token uses an expert."""
        slots_E = jnp.arange(self.num_experts)
        return jnp.any(self.expert_TK[..., None] == slots_E, axis=-2)

    @property
    def load_E(self) -> Int[Array, "*N E"]:
        """Tokens that chose each expert."""
        return jnp.sum(self.chosen_TE, axis=-2, dtype=jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertSlots:
    """Routing in which experts choose: the tokens in the C slots of every expert.

    Attributes:
      token_EC: token of each slot; T means "no token".  No expert has a token twice.
      weight_EC: combine weight of each slot, float32.
      probs_TE: router scores, float32.
      logits_TE: router logits, float32.
    """

    token_EC: Int[Array, "E C"]
    weight_EC: Float[Array, "E C"]
    probs_TE: Float[Array, "T E"]
    logits_TE: Float[Array, "T E"]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.token_EC.shape[0]

    @property
    def chosen_TE(self) -> Bool[Array, "T E"]:
        """Whether an expert has a token."""
        tokens, experts = self.probs_TE.shape[0], self.num_experts
        expert_E1 = jnp.arange(experts)[:, None]
        chosen_TE = jnp.zeros((tokens, experts), bool)
        return chosen_TE.at[self.token_EC, expert_E1].set(True, mode="drop")

    def by_token(self) -> Routing:
        """The same pairs as each token's experts, in the order of their numbers; K = E."""
        tokens, experts = self.probs_TE.shape
        weight_TE = jnp.zeros((tokens, experts), jnp.float32)
        expert_E1 = jnp.arange(experts)[:, None]
        weight_TE = weight_TE.at[self.token_EC, expert_E1].set(self.weight_EC, mode="drop")
        expert_TE = jnp.where(self.chosen_TE, jnp.arange(experts), experts).astype(jnp.int32)
        most = self.token_EC.size
        pairs = (expert_TE, weight_TE, self.probs_TE, self.logits_TE, experts)
        return used_first(Routing(*pairs, most_rows=most))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftSlots:
    """Soft routing: every slot of every expert holds a mean of all tokens (arXiv 2308.00951).

    Attributes:
      dispatch_TEC: share of each token in a slot, float32; sums to 1 over the tokens of a group.
      combine_TEC: share of a slot's output in each token's, float32.
      probs_TE: router scores, float32: the shares of the experts' slots together.
      logits_TE: likewise of the logits.
      length: tokens of a group, which follow each other in T; every group has its own C slots of
        every expert, and its tokens no others.  0: all tokens are one group.
    """

    dispatch_TEC: Float[Array, "*T E C"]
    combine_TEC: Float[Array, "*T E C"]
    probs_TE: Float[Array, "*T E"]
    logits_TE: Float[Array, "*T E"]
    length: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """E."""
        return self.dispatch_TEC.shape[-2]

    @property
    def slots(self) -> int:
        """K = E: every token is in a slot of every expert."""
        return self.num_experts

    @property
    def num_slots(self) -> int:
        """S, the slots of all experts in all groups."""
        tokens, experts, places = self.dispatch_TEC.shape[-3:]
        return experts * places * (tokens // self.length if self.length else 1)

    @property
    def experts_per_token_T(self) -> Int[Array, "*T"]:
        """E for all."""
        return jnp.full(self.dispatch_TEC.shape[:-2], self.num_experts, jnp.int32)

    @property
    def load_E(self) -> Int[Array, "*N E"]:
        """Rows that each expert computes: its slots, whatever tokens there are."""
        *layers, _, experts, _ = self.dispatch_TEC.shape
        return jnp.full((*layers, experts), self.num_slots // experts, jnp.int32)

    def slot_inputs(self, x_TD: Float[Array, "T D"]) -> Float[Array, "S D"]:
        """The means of tokens in all slots, float32: by group, expert and place."""
        mixed = jnp.einsum("glec,gld->gecd", *map(self._grouped, (self.dispatch_TEC, x_TD)))
        return mixed.reshape(-1, x_TD.shape[-1])

    def token_outputs(self, y_SD: Float[Array, "S D"]) -> Float[Array, "T D"]:
        """The sum of the slots' outputs for each token, float32; undoes :meth:`slot_inputs`."""
        _, experts, places = self.combine_TEC.shape
        y_GECD = y_SD.astype(jnp.float32).reshape(-1, experts, places, y_SD.shape[-1])
        y_GLD = jnp.einsum("glec,gecd->gld", self._grouped(self.combine_TEC), y_GECD)
        return y_GLD.reshape(-1, y_SD.shape[-1])

    def _grouped(self, x_TX: Float[Array, "T *X"]) -> Float[Array, "G L *X"]:
        length = self.length or len(x_TX)
        return x_TX.astype(jnp.float32).reshape(-1, length, *x_TX.shape[1:])

    def by_token(self) -> Routing:
        """The routing of tokens that use all experts, in the order of their numbers."""
        weight_TE = jnp.sum(self.combine_TEC, axis=-1)
        experts = self.num_experts
        expert_TE = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32), weight_TE.shape)
        return Routing(expert_TE, weight_TE, self.probs_TE, self.logits_TE, experts)

    def slots_by_token(self, missing: int = 0) -> Routing:
        """The routing of all slots in place of tokens: each goes to its own expert.

        Args:
          missing: empty slots behind them, which go nowhere.
        """
        _, experts, places = self.dispatch_TEC.shape
        expert_S = jnp.repeat(jnp.arange(experts, dtype=jnp.int32), places)
        expert_S = jnp.tile(expert_S, self.num_slots // len(expert_S))
        expert_S1 = jnp.pad(expert_S, (0, missing), constant_values=experts)[:, None]
        nothing_SE = jnp.zeros((len(expert_S1), experts), jnp.float32)
        ones_S1 = jnp.ones(expert_S1.shape, jnp.float32)
        return Routing(expert_S1, ones_S1, nothing_SE, nothing_SE, experts)


def softmax_scores(
    logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """(probs_TE, logits_TE), both float32; padding tokens get flat scores."""
    logits_TE = masked_logits(logits_TE, valid_T)
    return jax.nn.softmax(logits_TE, axis=-1), logits_TE


def masked_logits(logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]) -> Float[Array, "T E"]:
    """Logits in float32, zeros for padding tokens."""
    # Padding may hold NaN: masked after the softmax, its gradient would be 0 * NaN.
    return jnp.where(valid_T[:, None], logits_TE.astype(jnp.float32), 0.0)


def alive(logits_TE: Float[Array, "*T E"]) -> Bool[Array, "*T E"]:
    """Whether tokens may choose the expert of a logit; see :data:`DEAD`."""
    return logits_TE > DEAD / 2


def fill_slots(
    probs_TE: Float[Array, "T E"],
    logits_TE: Float[Array, "T E"],
    expert_TK: Int[Array, "T K"],
    keep_TK: Bool[Array, "T K"],
    *,
    renormalize: bool,
    free_experts: int = 0,
) -> Routing:
    """Builds a Routing from candidate experts and which of them are kept.

    The combine weight is the router's score, so it carries the gradient to the router; the choice
    itself is discrete and carries none.

    Args:
      probs_TE: router scores.
      logits_TE: router logits.
      expert_TK: candidate experts, no expert twice in a row.
      keep_TK: the candidates that are used.
      renormalize: divide the weights of a token by their sum.
      free_experts: columns behind those of the experts; they fill no slot, whatever is kept.
    """
    experts = probs_TE.shape[-1] - free_experts
    keep_TK &= expert_TK < experts
    weight_TK = jnp.where(keep_TK, jnp.take_along_axis(probs_TE, expert_TK, axis=-1), 0.0)
    if renormalize:
        total_T1 = jnp.sum(weight_TK, axis=-1, keepdims=True)
        weight_TK = weight_TK / jnp.where(total_T1 > 0, total_T1, 1.0)
    expert_TK = jnp.where(keep_TK, expert_TK, experts).astype(jnp.int32)
    routing = Routing(expert_TK, weight_TK, probs_TE, logits_TE, experts)
    return used_first(routing) if free_experts else routing


def used_first(routing: Routing) -> Routing:
    """The same routing with empty slots behind the used ones."""
    order_TK = jnp.argsort(~routing.used_TK, axis=-1, stable=True)
    take = jnp.take_along_axis
    return dataclasses.replace(
        routing,
        expert_TK=take(routing.expert_TK, order_TK, axis=-1),
        weight_TK=take(routing.weight_TK, order_TK, axis=-1),
    )


def straight_through(routing: Routing) -> Routing:
    """The same routing with weights of exactly 1, whose gradient is that of the weights before."""
    weight_TK = routing.weight_TK
    one_TK = 1.0 + (weight_TK - jax.lax.stop_gradient(weight_TK))
    return dataclasses.replace(routing, weight_TK=jnp.where(routing.used_TK, one_TK, 0.0))
