"""Expert threshold routing: every expert has a cut-off, a moving quantile of its logits.

Expert Threshold (arXiv 2603.11535).  Once the cut-offs are there, a token chooses by itself, as in
token choice, and experts get an even load without a loss, as in expert choice.

Axis legend: T tokens of a microbatch on all devices, E experts, B bins, N MoE layers.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import free_setting, model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing.quantiles import histogram, quantile
from dynmoe_jax.routing.record import Routing, alive, fill_slots, masked_logits
from dynmoe_jax.routing.router import Bounds, Router, RouterInput


@ROUTERS.register("expert_threshold")
@dataclasses.dataclass(frozen=True)
class ExpertThreshold(Router):
    """A token takes every expert whose logit is above the expert's cut-off, weighed by its sigmoid.

    The cut-off is the moving average, corrected for its start, of the logit of the k-th token of a
    batch, k = T a / E for a experts per token.  A token may get no expert: a shared one
    (``config.model.moe.shared_hidden_width``) is meant to be there.

    In training alone, tokens are chosen among: for the first steps each expert takes its k best,
    and then at least (1 - C) k and at most (1 + C) k.  Inference always goes by the cut-offs, as
    they are, and is causal.

    ``over="microbatch"`` averages the cut-offs of microbatches, as the paper does.  ``"batch"``
    counts logits in 1000 bins of their sigmoid over all microbatches, so that the cut-off does not
    depend on how the batch is cut, but is exact to a bin.
    """

    experts_per_token: float = model_setting(
        1.0, "mean experts per token (a); an expert's share is a / E", unit="experts", above=0.0
    )
    decay: float = free_setting(
        0.999, "decay of the moving average of cut-offs (beta)", low=0.0, high=0.999999
    )
    warmup_steps: int = free_setting(
        4000, "steps in which each expert takes its k best tokens", unit="steps", low=0
    )
    guard: float = free_setting(
        0.5,
        "in training an expert takes k tokens, give or take this share (C); 0 = as many as pass",
        low=0.0,
    )
    over: str = free_setting(
        "microbatch",
        "tokens of which a cut-off is a quantile: each microbatch, then their mean, or the batch",
        choices=("microbatch", "batch"),
    )
    group: ClassVar[str] = "batch"
    losses: ClassVar = {"router_z": 0.0}
    gives = frozenset({"logits", "counts"})

    def describe(self) -> str:
        """Names the rule."""
        return f"expert thresholds, {self.experts_per_token:g} on average"

    def advice(self, wish: str) -> str:
        """Names what the cut-offs follow."""
        if wish == "balance":
            return "lower config.model.moe.expert_threshold.decay, or its guard"
        return f"set config.model.moe.expert_threshold.experts_per_token for {wish}"

    def bounds(self, num_experts: int) -> Bounds:
        """All experts at most, none at the least."""
        expected = self.experts_per_token
        usual = min((1 + self.guard) * expected, num_experts)
        return Bounds(num_experts, 0, expected, usual)

    def initial_state(self, num_experts: int):
        """No cut-off yet, and no update; and what the guard did in the last step."""
        return {
            "cut_E": jnp.zeros(num_experts, jnp.float32),
            "updates": jnp.int32(0),
            "held_back": jnp.float32(0),
        }

    def shown(self, state):
        """The mean cut-off, and the pairs beyond the guard, of those above their cut-offs."""
        return {"cut": jnp.mean(state["cut_E"], axis=-1), "held_back": state["held_back"]}

    def __call__(self, params, given: RouterInput) -> Routing:
        """Routes T tokens; the order of choice is that of the logits, from the largest down."""
        logits_TE = masked_logits(given.logits_TE, given.valid_T)
        tokens, experts = logits_TE.shape
        keep_TE, most = self._passes(logits_TE, given), 0
        if given.training:
            keep_TE = _ranks(logits_TE, given.valid_T) < self._counts(keep_TE, given)
            most = experts * self._most(tokens, experts)
        score_TE = jax.nn.sigmoid(logits_TE)
        above_TE = jnp.where(keep_TE, jax.lax.stop_gradient(logits_TE), -jnp.inf)
        _, expert_TE = jax.lax.top_k(above_TE, experts)
        keep_TE = jnp.take_along_axis(keep_TE, expert_TE, axis=-1)
        routing = fill_slots(score_TE, logits_TE, expert_TE, keep_TE, renormalize=False)
        return dataclasses.replace(routing, most_rows=min(most, routing.expert_TK.size))

    def measure(self, params, given: RouterInput, routing: Routing):
        """Cut-offs of the microbatch, or what they are made of, and what the guard did.

        Experts that no token may choose give no cut-off.
        """
        logits_TE = jax.lax.stop_gradient(routing.logits_TE)
        tokens = jnp.sum(given.valid_T)
        counts_TE = alive(logits_TE) & given.valid_T[:, None]
        if self.over == "batch":
            counted = jax.vmap(lambda p_T, counts_T: histogram(p_T[:, None], counts_T), in_axes=1)
            cut = {"score_EB": counted(jax.nn.sigmoid(logits_TE), counts_TE)}
        else:
            sorted_TE = -jnp.sort(jnp.where(given.valid_T[:, None], -logits_TE, jnp.inf), axis=0)
            last = jnp.maximum(self._wanted(tokens, logits_TE.shape[1]) - 1, 0)
            some_E = jnp.any(counts_TE, axis=0)
            cut = {
                "cut_E": jnp.where(some_E, sorted_TE[last], 0.0),
                "microbatches_E": some_E.astype(jnp.int32),
            }
        left_TE = self._passes(logits_TE, given) & ~routing.chosen_TE
        left = jnp.where(self._warm(given.state), 0, jnp.sum(left_TE, dtype=jnp.int32))
        return cut | {"held_back": left}

    def next_state(self, params_N, state_N, seen_N):
        """c <- the average of all cut-offs so far, each weighed by beta to its age."""
        if self.over == "batch":
            count_NEB = seen_N["score_EB"]
            experts = count_NEB.shape[1]
            share = 1 - self.experts_per_token / experts
            score_NE = jax.vmap(jax.vmap(lambda count_B: quantile(count_B, share)))(count_NEB)
            # Within the outermost bins there is no telling how large a logit is.
            half = 0.5 / count_NEB.shape[-1]
            cut_NE = jax.scipy.special.logit(jnp.clip(score_NE, half, 1 - half))
            seen_NE = jnp.any(count_NEB > 0, axis=-1)
        else:
            number_NE = seen_N["microbatches_E"]
            cut_NE, seen_NE = seen_N["cut_E"] / jnp.maximum(number_NE, 1), number_NE > 0
        updates_N = state_N["updates"] + jnp.any(seen_NE, axis=-1)
        # raw / (1 - beta^n) as a running mean, which the first update sets exactly.
        power_N1 = self.decay ** (jnp.maximum(updates_N, 1)[:, None] - 1.0)
        old_N1 = self.decay * (1 - power_N1) / (1 - self.decay * power_N1)
        mean_NE = old_N1 * state_N["cut_E"] + (1 - old_N1) * cut_NE
        held_back_N = seen_N["held_back"].astype(jnp.float32)
        return {
            "cut_E": jnp.where(seen_NE, mean_NE, state_N["cut_E"]),
            "updates": updates_N,
            "held_back": held_back_N,
        }, None

    def _passes(self, logits_TE, given):
        """Whether a logit is above its expert's cut-off."""
        return (logits_TE > given.state["cut_E"]) & given.valid_T[:, None]

    def _warm(self, state):
        """Whether experts still choose: in the first steps, and until there is a cut-off."""
        return state["updates"] < max(self.warmup_steps, 1)

    def _wanted(self, tokens, experts: int):
        """k, of so many valid tokens."""
        return jnp.maximum((tokens * (self.experts_per_token / experts)).astype(jnp.int32), 1)

    def _counts(self, passes_TE, given):
        """Tokens that each expert takes in training."""
        wanted = self._wanted(jnp.sum(given.valid_T), passes_TE.shape[1])
        demand_E = jnp.sum(passes_TE, axis=0, dtype=jnp.int32)
        if self.guard:
            fewest = jnp.ceil((1 - self.guard) * wanted).astype(jnp.int32)
            most = jnp.floor((1 + self.guard) * wanted).astype(jnp.int32)
            demand_E = jnp.clip(demand_E, fewest, most)
        return jnp.where(self._warm(given.state), wanted, demand_E)

    def _most(self, tokens: int, experts: int) -> int:
        """Bound on the tokens of an expert in training, of so many tokens, valid or not."""
        if not self.guard:
            return tokens
        # One more, and again: the device counts in float32, which may round up to a whole number.
        wanted = math.floor(tokens * self.experts_per_token / experts) + 1
        return min(tokens, math.floor((1 + self.guard) * wanted) + 1)


def _ranks(logits_TE, valid_T):
    """Place of each token among an expert's, from 0; equal logits in the order of the tokens.

    Padding is behind all others: beyond the count of any expert.
    """
    tokens = logits_TE.shape[0]
    key_TE = jnp.where(valid_T[:, None], -jax.lax.stop_gradient(logits_TE), jnp.inf)
    order_TE = jnp.argsort(key_TE, axis=0, stable=True)
    rank_TE = jnp.argsort(order_TE, axis=0)
    return jnp.where(valid_T[:, None], rank_TE, tokens)
