"""Retention of checkpoints: when one is written and which ones are kept, as Orbax's policies."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from orbax.checkpoint import checkpoint_managers as ocm

from dynmoe_jax import config

METRIC = "heldout_loss"


@dataclasses.dataclass
class BeforeDecay(ocm.PreservationPolicy):
    """Keeps the newest checkpoint that a longer run can go on from.

    Attributes:
      step: after which the learning rate falls; None in a run that keeps no such checkpoint.
    """

    step: int | None = None

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        """Whether each of the checkpoints stays."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        before = [] if self.step is None else [step for step in steps if step <= self.step]
        return [step == max(before, default=None) for step in steps]


def save_policy(checkpoint: config.Checkpoint) -> ocm.SaveDecisionPolicy:
    """Every so many steps, and every so many minutes, also over a restart."""
    policies: list[ocm.SaveDecisionPolicy] = []
    if checkpoint.every_steps:
        policies.append(ocm.FixedIntervalPolicy(checkpoint.every_steps))
    if checkpoint.every_minutes:
        seconds = max(1, round(checkpoint.every_minutes * 60))
        policies.append(ocm.ContinuousCheckpointingPolicy(minimum_interval_secs=seconds))
    return ocm.AnySavePolicy(policies)


def keep_policy(checkpoint: config.Checkpoint, before_decay: BeforeDecay) -> ocm.PreservationPolicy:
    """The newest, the best, one every so many steps or hours, and the one before the decay of the
    learning rate: whichever rule wants one."""
    policies: list[ocm.PreservationPolicy] = [ocm.LatestN(checkpoint.keep), before_decay]
    if checkpoint.keep_best:
        policies.append(
            ocm.BestN(
                get_metric_fn=heldout_loss,
                reverse=True,
                n=checkpoint.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    if checkpoint.keep_every_steps:
        policies.append(ocm.EveryNSteps(checkpoint.keep_every_steps))
    if checkpoint.keep_every_hours:
        seconds = max(1, round(checkpoint.keep_every_hours * 3600))
        policies.append(ocm.EveryNSeconds(seconds))
    return ocm.AnyPreservationPolicy(policies)


def heldout_loss(metrics: Mapping[str, float]) -> float:
    """Held-out loss, of which the best checkpoint has least; infinite where nothing finite was
    evaluated."""
    loss = metrics.get(METRIC, math.inf)
    return loss if math.isfinite(loss) else math.inf
