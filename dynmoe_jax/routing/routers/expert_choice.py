"""Expert choice: experts choose tokens, so their load is even (arXiv 2202.09368).

Axis legend: T tokens, E experts, S groups, L tokens of a group, C slots of an expert in a group.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.record import ExpertSlots, softmax_scores
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("expert_choice")
@dataclasses.dataclass(frozen=True)
class ExpertChoice(Router):
    """Every expert takes the tokens of a group that give it the largest probabilities.

    It takes max(1, floor(n c / E)) of the n valid tokens, weighed by their probabilities (section
    3.2); of equal ones the first.  Padding is no part of the group: n is not its length, so that
    more padding changes nothing.  Of n = 0 it takes none.
    """

    experts_per_token: float = model_setting(
        2.0,
        "mean experts of a token (c): each expert takes c / E of the tokens, rounded down",
        unit="experts",
        above=0.0,
        per_layer=True,
    )
    group: str = model_setting(
        "sequence",
        "the tokens among which an expert chooses: of one sequence, or of the whole batch",
        choices=("sequence", "batch"),
    )
    causal: ClassVar = False
    losses: ClassVar = {"router_z": 0.0}

    def describe(self) -> str:
        """Names the rule."""
        return f"expert-choice, {self.experts_per_token:g} on average in each {self.group},"

    def advice(self, wish: str) -> str:
        """Names the mean; load is even by itself."""
        if wish == "balance":
            return "choose tokens from larger groups: every expert takes as many of a group"
        verb = "lower" if wish == "fewer" else "raise"
        return f"{verb} config.model.moe.expert_choice.experts_per_token"

    def bounds(self, num_experts: int) -> Bounds:
        """Any number of experts for one token, c for all on average."""
        mean = self.experts_per_token
        return Bounds(num_experts, 0, mean, mean)

    def capacities(self, tokens: int, num_experts: int) -> Int[np.ndarray, "L+1"]:
        """Tokens that an expert takes of 0, 1, … valid ones."""
        count_L = np.arange(tokens + 1)
        share_L = np.floor(count_L * self.experts_per_token / num_experts).astype(np.int32)
        return np.where(count_L > 0, np.maximum(share_L, 1), 0)

    def __call__(self, params, given: RouterInput) -> ExpertSlots:
        """Lets every expert choose among T tokens."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        tokens, experts = probs_TE.shape
        length = given.length if self.group == "sequence" and given.length else tokens
        capacity_L = self.capacities(length, experts)
        # Slots are laid out for a group without padding; one with n valid tokens uses the first.
        fewest_C = np.searchsorted(capacity_L, np.arange(1, capacity_L[-1] + 1))
        score_TE = jnp.where(given.valid_T[:, None], jax.lax.stop_gradient(probs_TE), -1.0)
        score_SEL = jnp.swapaxes(score_TE.reshape(-1, length, experts), 1, 2)
        _, place_SEC = jax.lax.top_k(score_SEL, len(fewest_C))
        valid_S = jnp.sum(given.valid_T.reshape(-1, length), axis=1)
        used_S1C = (valid_S[:, None] >= fewest_C)[:, None]
        first_S11 = length * jnp.arange(tokens // length)[:, None, None]
        token_SEC = jnp.where(used_S1C, first_S11 + place_SEC, tokens).astype(jnp.int32)
        token_EC = jnp.swapaxes(token_SEC, 0, 1).reshape(experts, -1)
        expert_E1 = jnp.arange(experts)[:, None]
        weight_EC = probs_TE.at[token_EC, expert_E1].get(mode="fill", fill_value=0.0)
        return ExpertSlots(token_EC, weight_EC, probs_TE, logits_TE)
