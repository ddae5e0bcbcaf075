"""Record of what a router decides, and the interface of routers.

Axis legend (used in names everywhere): T tokens, E experts, K slots per token (a static bound).
"""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Routing of T tokens: the experts that each uses, and the weights of their outputs.

    Attributes:
      expert_TK: expert of each slot; E means "no expert", a slot that costs nothing.
      weight_TK: combine weight of each slot, float32, 0 in an empty slot.
      probs_TE: router scores, float32; the losses read these.
      logits_TE: router logits, float32.

    The leading axis may have more axes in front of it (a stack over layers, or [B, L] in place of
    T); everything here works on the trailing axes.
    """

    expert_TK: Int[Array, "*T K"]
    weight_TK: Float[Array, "*T K"]
    probs_TE: Float[Array, "*T E"]
    logits_TE: Float[Array, "*T E"]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_TE.shape[-1]

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


class Router(Protocol):
    """Turns router logits into a :class:`Routing`.  Knows no weights, no mesh, no transport."""

    causal: ClassVar[bool]
    """Whether a token's routing is independent of later tokens; a decoder refuses others."""

    @property
    def slots(self) -> int:
        """K: the smallest provable bound on the experts of one token."""

    def __call__(self, logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]) -> Routing:
        """Routes T tokens; tokens that are not valid (padding) get no expert at all."""


def softmax_scores(
    logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]
) -> tuple[Float[Array, "T E"], Float[Array, "T E"]]:
    """(probs_TE, logits_TE), both float32; padding tokens get flat scores."""
    # Padding may hold NaN: masked after the softmax, its gradient would be 0 * NaN.
    logits_TE = jnp.where(valid_T[:, None], logits_TE.astype(jnp.float32), 0.0)
    return jax.nn.softmax(logits_TE, axis=-1), logits_TE


def fill_slots(
    probs_TE: Float[Array, "T E"],
    logits_TE: Float[Array, "T E"],
    expert_TK: Int[Array, "T K"],
    keep_TK: Bool[Array, "T K"],
    *,
    renormalize: bool,
) -> Routing:
    """Builds a Routing from candidate experts and which of them are kept.

    The combine weight is the router's probability, so it carries the gradient to the router; the
    choice itself is discrete and carries none.

    Args:
      probs_TE: router scores.
      logits_TE: router logits.
      expert_TK: candidate experts, no expert twice in a row.
      keep_TK: the candidates that are used.
      renormalize: divide the weights of a token by their sum.
    """
    weight_TK = jnp.where(keep_TK, jnp.take_along_axis(probs_TE, expert_TK, axis=-1), 0.0)
    if renormalize:
        total_T1 = jnp.sum(weight_TK, axis=-1, keepdims=True)
        weight_TK = weight_TK / jnp.where(total_T1 > 0, total_T1, 1.0)
    expert_TK = jnp.where(keep_TK, expert_TK, probs_TE.shape[-1])
    return Routing(expert_TK.astype(jnp.int32), weight_TK, probs_TE, logits_TE)
