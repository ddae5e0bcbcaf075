"""Sequence-level top-k: the tokens of a sequence share k experts per token on average.

SeqTopK (arXiv 2511.06494), with a ledger that keeps the rule of decoding within the same budget.

Axis legend: B sequences, L positions, T = B L tokens, E experts, K = k + extra slots per token,
S tokens of a sequence that a cache has room for.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import Routing, fill_slots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("seq_top_k")
@dataclasses.dataclass(frozen=True)
class SeqTopK(Router):
    """The L k best (token, expert) pairs of a sequence are used, weighed by their probabilities.

    A sequence is a row of the batch with all documents that are packed into it; padding counts
    nowhere.  Of equal probabilities those of earlier tokens come first, and of a token those of
    experts with smaller numbers.  Every token uses at least ``min_experts`` and at most k +
    ``extra`` experts.

    Training looks at the whole sequence.  Inference is online, and so causal: the m-th token uses
    the experts that are among the m k best pairs of the first m tokens, within the same bounds, and
    no more than m k less what earlier tokens have used.  Without that ledger a sequence whose
    scores rise would use K experts for every token.
    """

    k: int = model_setting(2, "mean experts per token", unit="experts", low=1, per_layer=True)
    min_experts: int = model_setting(
        1, "experts that a token uses at the least", unit="experts", low=0
    )
    extra: int = model_setting(2, "experts beyond k that a token may use", low=0)
    renormalize: bool = model_setting(False, "divide the combine weights by their sum")
    causal_in_training: ClassVar[bool] = False
    group: ClassVar[str] = "sequence"

    def obstacle(self, num_experts: int) -> str | None:
        """Says so where the least is more than the mean."""
        if obstacle := super().obstacle(num_experts):
            return obstacle
        if self.min_experts > self.k:
            return f"min_experts={self.min_experts} must be at most k={self.k}"
        return None

    def describe(self) -> str:
        """Names the rule."""
        return f"top-{self.k} per token of a whole sequence"

    def advice(self, wish: str) -> str:
        """Names k."""
        if wish == "balance":
            return super().advice(wish)
        return f"{'lower' if wish == 'fewer' else 'raise'} config.model.moe.seq_top_k.k"

    def bounds(self, num_experts: int) -> Bounds:
        """K = k + extra; k on average."""
        slots = min(self.k + self.extra, num_experts)
        return Bounds(slots, self.min_experts, float(self.k), float(self.k))

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the order of choice is that of the probabilities."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        slots = self.bounds(probs_TE.shape[-1]).slots
        score_TE = jax.lax.stop_gradient(probs_TE)
        best_TK, expert_TK = jax.lax.top_k(score_TE, slots)
        length = given.length or len(score_TE)
        valid_BL = given.valid_T.reshape(-1, length)
        best_BLK = best_TK.reshape(*valid_BL.shape, slots)
        if given.training:
            count_BL = self._together(best_BLK, valid_BL)
        else:
            score_BLE = score_TE.reshape(*valid_BL.shape, -1)
            cache = given.cache or self.initial_cache(*valid_BL.shape, score_TE.shape[-1])
            count_BL = self._online(score_BLE, best_BLK, valid_BL, cache)
        keep_TK = jnp.arange(slots) < count_BL.reshape(-1, 1)
        return fill_slots(probs_TE, logits_TE, expert_TK, keep_TK, renormalize=self.renormalize)

    def initial_cache(self, batch: int, length: int, num_experts: int):
        """Scores of the tokens so far, their number, and the experts that they have used."""
        return {
            "scores_BSE": jnp.zeros((batch, length, num_experts), jnp.float32),
            "seen_B": jnp.zeros(batch, jnp.int32),
            "used_B": jnp.zeros(batch, jnp.int32),
        }

    def next_cache(self, params, given: RouterInput, routing: Routing):
        """The cache with the tokens of :meth:`__call__`; padding is left out."""
        valid_BL = given.valid_T.reshape(-1, given.length)
        score_BLE = routing.probs_TE.reshape(*valid_BL.shape, -1)
        seen_B, used_BL = given.cache["seen_B"], routing.experts_per_token_T.reshape(valid_BL.shape)
        scores_BSE = given.cache["scores_BSE"]
        place_BL = seen_B[:, None] + jnp.cumsum(valid_BL, axis=1, dtype=jnp.int32) - 1
        place_BL = jnp.where(valid_BL, place_BL, scores_BSE.shape[1])
        row_B1 = jnp.arange(len(seen_B))[:, None]
        return {
            "scores_BSE": scores_BSE.at[row_B1, place_BL].set(score_BLE, mode="drop"),
            "seen_B": seen_B + jnp.sum(valid_BL, axis=1, dtype=jnp.int32),
            "used_B": given.cache["used_B"] + jnp.sum(used_BL, axis=1),
        }

    def _together(self, best_BLK, valid_BL):
        """Experts of each token where whole sequences are there.

        Only the K best scores of a token can be used; the first ``min_experts`` are.
        """
        batch, length, slots = best_BLK.shape
        key_BLK = jnp.where(jnp.arange(slots) < self.min_experts, jnp.inf, best_BLK)
        key_BLK = jnp.where(valid_BL[..., None], key_BLK, -jnp.inf)
        # Equal keys in the order of their indices, which is that of positions.
        _, pair_BP = jax.lax.top_k(key_BLK.reshape(batch, -1), length * self.k)
        budget_B1 = self.k * jnp.sum(valid_BL, axis=1, keepdims=True)
        used_BP = (jnp.arange(length * self.k) < budget_B1).astype(jnp.int32)
        row_B1 = jnp.arange(batch)[:, None]
        return jnp.zeros((batch, length), jnp.int32).at[row_B1, pair_BP // slots].add(used_BP)

    def _online(self, score_BLE, best_BLK, valid_BL, cache):
        """Experts of each token by what is known when it comes."""
        slots, places_S = best_BLK.shape[-1], jnp.arange(cache["scores_BSE"].shape[1])

        def next_token(cache, token):
            score_BE, best_BK, valid_B = token
            scores_BSE, seen_B, used_B = cache["scores_BSE"], cache["seen_B"], cache["used_B"]
            # Pairs that come before a token's i-th best: those of earlier tokens that are no
            # smaller, and i of its own.
            there_BS = places_S < seen_B[:, None]
            earlier_BK = jnp.stack(
                [
                    jnp.sum((scores_BSE >= best_BK[:, i, None, None]) & there_BS[..., None], (1, 2))
                    for i in range(slots)
                ],
                axis=-1,
            )
            budget_B = self.k * (seen_B + 1)
            among_BK = earlier_BK + jnp.arange(slots) < budget_B[:, None]
            count_B = jnp.sum(among_BK, axis=-1)
            count_B = jnp.clip(count_B, self.min_experts, jnp.minimum(budget_B - used_B, slots))
            count_B = jnp.where(valid_B, count_B, 0)
            here_BS = (places_S == seen_B[:, None]) & valid_B[:, None]
            cache = {
                "scores_BSE": jnp.where(here_BS[..., None], score_BE[:, None], scores_BSE),
                "seen_B": seen_B + valid_B,
                "used_B": used_B + count_B,
            }
            return cache, count_B

        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (score_BLE, best_BLK, valid_BL))
        _, count_LB = jax.lax.scan(next_token, cache, tokens)
        return count_LB.T
