"""Top-P dynamic routing: harder tokens use more experts (arXiv 2403.07652, section 2.2)."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores


def top_p_slots(num_experts: int, threshold: float) -> int:
    """The most experts that one token can need: floor(p E) + 1, at most E.

    The m most probable experts hold at least m/E of the mass, so the mass before slot m = floor(p
    E) + 1 (counted from 0) already exceeds p.  E = 16 and p = 0.4 need 7 slots, not 16.
    """
    # The comparison runs in float32: on its threshold, and with room for what float32 sums lose
    # (E = 25, p = 0.08: two even probabilities sum up to p, not to more, and a third is needed).
    room = num_experts * 2**-20
    return min(num_experts, math.floor(float(np.float32(threshold)) * num_experts + room) + 1)


@dataclasses.dataclass(frozen=True)
class TopP:
    """A token takes its most probable experts until their cumulative probability passes p.

    The expert that crosses the threshold is included, so a token uses at least one.  An expert is
    taken while the mass *before* it is <= p, which is the strict ``>`` of the released code; the
    paper's ``>=`` differs at exact equality alone.

    Attributes:
      num_experts: E.
      threshold: p, in (0, 1].
      renormalize: divide the weights by their sum; the paper does not.
    """

    num_experts: int
    threshold: float
    renormalize: bool = False
    causal: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        """K, see :func:`top_p_slots`."""
        return top_p_slots(self.num_experts, self.threshold)

    def __call__(self, logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]) -> Routing:
        """Routes T tokens; equal probabilities are taken in the order of the experts' ids."""
        probs_TE, logits_TE = softmax_scores(logits_TE, valid_T)
        sorted_TK, expert_TK = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), self.slots)
        # Shifted, not "cumsum minus own": the threshold is compared with the very sums that the
        # released code compares with.
        mass_TK = jnp.cumsum(sorted_TK, axis=-1)
        mass_before_TK = jnp.pad(mass_TK[:, :-1], ((0, 0), (1, 0)))
        keep_TK = (mass_before_TK <= self.threshold) & valid_T[:, None]
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)
