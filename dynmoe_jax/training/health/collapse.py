"""Routing that has collapsed: experts that nobody chooses, tokens that all choose alike.

Axis legend: N MoE layers, E experts.
"""

import numpy as np
from jaxtyping import Bool, Int

from dynmoe_jax import config
from dynmoe_jax.routing.statistics import existing_experts

_NEAR = 0.02
"""Share of the way between one expert per token and the bound: so near to an end counts as at
it."""

_NAMED = 5


class CollapseWatch:
    """Counts for how many steps a sign of collapse has lasted, and words each of them once.

    Args:
      cfg: all settings.
      step: the step that the run continues after.
    """

    def __init__(self, cfg: config.Config, step: int):
        self._moe, self._after, self._begun = cfg.model.moe, cfg.train.collapse_steps, step
        self._model, layers = cfg.model, cfg.model.moe_settings
        if not cfg.model.layers:
            layers = layers[:1]  # the others are equal
        bounds = [moe.route.bounds(moe.num_experts) for moe in layers]
        # Layers whose router may choose how many experts a token uses.
        self._free = [bound.fewest < bound.slots for bound in bounds]
        self._fewest, self._most = (
            float(np.mean([getattr(bound, end) for bound in bounds], where=self._free))
            if any(self._free)
            else 0.0
            for end in ("fewest", "slots")
        )
        self._exists_NE = existing_experts(
            [moe.num_experts for moe in layers], max((m.num_experts for m in layers), default=0)
        )
        self._used_at_NE: Int[np.ndarray, "N E"] | None = None
        self._clear_at: dict[str, int] = {}
        self._said: set[str] = set()

    def look(self, step: int, load_NE: Int[np.ndarray, "N E"], tokens: int) -> list[str]:
        """The warnings that are new with this step; each comes once.

        Args:
          step: rising from call to call.
          load_NE: valid tokens of the step's batch that chose each expert.
          tokens: valid tokens of the batch.
        """
        if not self._after or not load_NE.size or not tokens:
            return []
        found = {"unused": self._unused(step, load_NE)}
        if any(self._free):
            mean = float(load_NE.sum(axis=-1).mean(where=self._free)) / tokens
            found |= self._at_an_end(step, mean)
        new = {sign: words for sign, words in found.items() if words and sign not in self._said}
        self._said |= set(new)
        return [f"step {step:,}: {words}" for words in new.values()]

    def _unused(self, step: int, load_NE: Int[np.ndarray, "N E"]) -> str:
        if self._used_at_NE is None:
            self._used_at_NE = np.full(load_NE.shape, self._begun)
        self._used_at_NE = np.where((load_NE > 0) | ~self._exists_NE, step, self._used_at_NE)
        unused_NE = step - self._used_at_NE >= self._after
        if not unused_NE.any():
            return ""
        setting = f"config.model.moe.num_experts={self._moe.num_experts}"
        if self._model.layers:
            setting = "config.model.layers or config.model.moe.num_experts say"
        return (
            f"{_listed(unused_NE)} for at least {self._after:,} steps; "
            f"{self._moe.route.advice('balance')}, lower config.optimizer.learning_rate, or have "
            f"fewer experts than {setting}."
        )

    def _at_an_end(self, step: int, mean: float) -> dict[str, str]:
        """Warnings by sign, for a router that may choose how many experts a token uses."""
        fewest, most = self._fewest, self._most
        way = (mean - fewest) / (most - fewest)
        found = {}
        used = f"tokens have used {mean:.2f} of at most {most:g} experts for {self._after:,}"
        advice = self._model.moe_settings[self._free.index(True)].route.advice
        if self._lasts("most", way >= 1 - _NEAR, step):
            found["most"] = (
                f"{used} steps, so the router tells no expert from another; {advice('fewer')}."
            )
        if self._lasts("fewest", way <= _NEAR, step):
            found["fewest"] = (
                f"{used} steps, so the router is sure of {fewest:g} for every token; "
                f"{advice('more')}."
            )
        return found

    def _lasts(self, sign: str, holds: bool, step: int) -> bool:
        if not holds:
            self._clear_at[sign] = step
        return step - self._clear_at.get(sign, self._begun) >= self._after


def _listed(unused_NE: Bool[np.ndarray, "N E"]) -> str:
    """Lists experts that no token has chosen, the first few by number."""
    pairs = [f"{expert} of MoE layer {layer}" for layer, expert in np.argwhere(unused_NE)]
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    noun = "expert" if len(pairs) == 1 else "experts"
    return f"no token has chosen {noun} {', '.join(pairs[:_NAMED])}{more}"
