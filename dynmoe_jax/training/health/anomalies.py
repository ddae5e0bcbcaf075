"""Anomalies of training: skipped updates and loss spikes, as the metrics of steps show them."""

import dataclasses
from collections.abc import Mapping

import jax

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.training.health.collapse import CollapseWatch
from dynmoe_jax.training.loss import Batch

_WARNED_SKIPS = 20
"""Streaks of skipped updates that are worth a line each; metrics.jsonl counts all."""


@dataclasses.dataclass(frozen=True)
class TooManySkips:
    """The updates of ``count`` steps in a row up to ``step`` were skipped; its batch is kept."""

    step: int
    count: int
    batch: Batch


@dataclasses.dataclass(frozen=True)
class Spike:
    """The losses of the steps ``first`` to ``last`` lay above the bound."""

    first: int
    last: int


Anomaly = TooManySkips | Spike


class AnomalyWatch:
    """Looks for anomalies in every step, once and in order.

    Args:
      cfg: all settings.
      done: the step that the run continues after.
    """

    def __init__(self, cfg: config.Config, done: int):
        self._train = cfg.train
        self._collapse = CollapseWatch(cfg, done)
        self._streaks = 0

    def look(
        self, step: int, metrics: Mapping[str, jax.Array], batch: Batch | None
    ) -> Anomaly | None:
        """Warns of what can be lived with, and returns what cannot.

        Args:
          step: whose metrics they are; they have been computed, so that reading them is cheap.
          metrics: of the step.
          batch: of the step.
        """
        names = ("loss", "grad_norm", "skipped_updates", "skipped_in_a_row", "spike_steps")
        values = jax.device_get({name: metrics[name] for name in names})
        if values["skipped_in_a_row"] > 0:
            return self._skipped(step, values, batch)
        if values["spike_steps"] == self._train.spike_steps:
            return self._spiked(step, float(values["loss"]))
        return None

    def look_at_routing(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Warns of routing that has collapsed; as often as lines are logged is enough."""
        load_NE, tokens = jax.device_get((metrics["load_NE"], metrics["tokens"]))
        for warning in self._collapse.look(step, load_NE, int(tokens)):
            warn(warning)

    def _skipped(self, step: int, values: Mapping, batch: Batch | None) -> TooManySkips | None:
        in_a_row, most = int(values["skipped_in_a_row"]), self._train.max_skipped_in_a_row
        if in_a_row >= most:
            return TooManySkips(step, in_a_row, batch)
        self._streaks += in_a_row == 1
        if in_a_row == 1 and self._streaks <= _WARNED_SKIPS:
            warn(
                f"step {step:,}: the loss is {values['loss']:g} and the gradient norm "
                f"{values['grad_norm']:g}, so its update is skipped ({values['skipped_updates']} "
                f"so far); the run stops after {most} in a row."
            )
        return None

    def _spiked(self, step: int, loss: float) -> Spike | None:
        if self._train.spike_action == "none":
            return None
        count = self._train.spike_steps
        warn(
            f"step {step:,}: the loss has jumped to {loss:.4g}, more than "
            f"{self._train.spike_deviations:g} deviations above its median, for {count} steps."
        )
        return Spike(step - count + 1, step) if self._train.spike_action == "rollback" else None
