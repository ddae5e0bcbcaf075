"""Top-k routing: Switch (k = 1, arXiv 2101.03961), GShard style (k = 2, arXiv 2006.16668)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores


@dataclasses.dataclass(frozen=True)
class TopK:
    """Every token takes its k most probable experts, weighed by their probabilities.

    Attributes:
      num_experts: E.
      k: experts per token.
      renormalize: divide the weights by their sum (GShard, Mixtral).
    """

    num_experts: int
    k: int
    renormalize: bool = False
    causal: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        """K = k."""
        return self.k

    def __call__(self, logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        probs_TE, logits_TE = softmax_scores(logits_TE, valid_T)
        _, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), self.k)
        keep_TK = jnp.broadcast_to(valid_T[:, None], expert_TK.shape)
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)
