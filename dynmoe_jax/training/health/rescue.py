"""Rescue of a run whose step went wrong: keep it and stop, or go back and around it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.command_line import EXIT_BAD_NUMBERS
from dynmoe_jax.console import warn
from dynmoe_jax.training.health.anomalies import Anomaly, Spike, TooManySkips
from dynmoe_jax.training.health.skips import Skip, batch_of_step, read_skips, write_skips
from dynmoe_jax.training.run import Run
from dynmoe_jax.training.step import TrainState

FOLDER = "not_finite"
ARRAYS, SETTINGS = "arrays", "settings.json"
MOST_ROLLBACKS = 3
"""From one checkpoint; a loss that jumps whatever the batches are is not the batches' fault."""


class BadNumbers(RuntimeError):
    """Training cannot go on; the message is one sentence for the user."""

    exit_code = EXIT_BAD_NUMBERS


class RolledBack(Exception):
    """The run's folder is back at an earlier step, from which the run is to be continued."""


def rescue(anomaly: Anomaly, run: Run, state: TrainState) -> None:
    """Stops the run, or takes it back; returns if there is nothing to go back to.

    Where the run stops anyway, skipped updates are left to the run that continues.  A spike is not:
    that run would go on from behind it.

    Args:
      anomaly: what was noticed.
      run: the run.
      state: the newest; after too many skips it holds the parameters that failed.

    Raises:
      BadNumbers: the run cannot go on.
      RolledBack: it can, from an earlier checkpoint.
    """
    if isinstance(anomaly, Spike):
        _roll_back(anomaly, run)
    elif not run.stop.requested:
        _stop(anomaly, run, state)


def _stop(skips: TooManySkips, run: Run, state: TrainState) -> None:
    folder = run.workdir / FOLDER / str(skips.step)
    with ocp.StandardCheckpointer() as writer:
        arrays = {"state": state, "batch": skips.batch}
        writer.save((folder / ARRAYS).absolute(), arrays, force=True)
    if agreement.is_first():
        text = json.dumps(config.to_dict(run.cfg), indent=2)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
    raise BadNumbers(
        f"The loss or the gradient was not finite in {skips.count} steps in a row, the last of "
        f"them step {skips.step:,}; its batch and state are kept, and "
        f"`python -m dynmoe_jax.training.health.replay --workdir={run.workdir}` shows where the "
        "first such number arises."
    )


def _roll_back(spike: Spike, run: Run) -> None:
    # The first high loss was computed after the update of the step before: that one goes too.
    culprit = spike.first - 1
    run.checkpoints.wait()
    target = agreement.on_first(
        lambda: max((step for step in run.checkpoints.steps() if step < culprit), default=None)
    )
    if target is None:
        warn(
            f"no checkpoint is older than the spike at step {spike.first:,}, so training goes on; "
            "lower config.checkpoint.every_steps or raise config.checkpoint.keep."
        )
        return
    skips = read_skips(run.workdir)
    if sum(skip.resumed_step == target for skip in skips) >= MOST_ROLLBACKS:
        raise BadNumbers(
            f"The loss jumped again at step {spike.first:,} after {MOST_ROLLBACKS} rollbacks to "
            f"step {target:,}; continue with a lower config.optimizer.learning_rate or "
            "config.optimizer.clip_norm."
        )
    skip = Skip(
        first=batch_of_step(culprit, skips),
        last=batch_of_step(spike.last, skips),
        spike_step=spike.first,
        resumed_step=target,
    )
    # In this order: killed in between, the run meets the spike again and comes here again.
    run.checkpoints.delete_after(target)
    agreement.on_first(lambda: write_skips(run.workdir, [*skips, skip]))
    raise RolledBack(
        f"back to step {target:,}; the batches {skip.first:,} to {skip.last:,} are left out."
    )


def without_old_streak(state: TrainState, train: config.Train) -> TrainState:
    """A restored state; a run that had stopped for its skipped updates gets another chance."""
    count = state.guard.skipped_in_a_row
    if int(count) < train.max_skipped_in_a_row:
        return state
    zero = jax.device_put(jnp.zeros_like(count), count.sharding)
    return dataclasses.replace(state, guard=dataclasses.replace(state.guard, skipped_in_a_row=zero))
