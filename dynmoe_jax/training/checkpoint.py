"""Checkpoints: state, data position and config under one step number, by Orbax."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dynmoe_jax import config

FOLDER = "checkpoints"

FREE_TO_CHANGE = (
    "checkpoint.", "evaluation.", "logging.", "loss.", "mesh.", "optimizer.",
    "train.steps", "train.log_every_steps", "train.microbatches", "data.directory",
    "model.dtype", "model.remat", "model.attention", "model.max_seq_len",
    "model.moe.backend", "model.moe.capacity_factor", "model.moe.rows_per_token",
)  # fmt: skip
"""Settings (or groups of them) that may differ between a checkpoint and the run that resumes."""


class Checkpoints:
    """The checkpoints of one run.  Saving is asynchronous; closing waits for it."""

    def __init__(self, workdir: Path, checkpoint: config.Checkpoint):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=checkpoint.keep, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=options,
            item_names=("state", "data", "config"),
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: dict, cfg: config.Config) -> None:
        """Saves once per step, without waiting for the disk."""
        if step == self.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config.to_dict(cfg)),
        )
        self._manager.save(step, args=items)

    def config(self, step: int) -> config.Config:
        """The settings that a checkpoint was written with."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return config.from_config_dict(self._manager.restore(step, args=args)["config"])

    def restore(self, step: int, state_like: Any) -> tuple[Any, dict]:
        """(state, data position) of a checkpoint, placed like ``state_like``.

        Args:
          step: which checkpoint.
          state_like: a tree of arrays or of ShapeDtypeStructs with shardings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self.wait()
        self._manager.close()


def check_compatible(saved: config.Config, current: config.Config, workdir: Path) -> None:
    """Raises ConfigError if the run in ``workdir`` cannot go on with other settings."""
    old = {path: value for path, _, value in config.walk(saved)}
    for path, _, value in config.walk(current):
        if value != old[path] and not path.startswith(FREE_TO_CHANGE):
            raise config.ConfigError(
                f"config.{path}={value!r} differs from {old[path]!r} of the checkpoint in "
                f"{workdir}; set it back, or start a new run with another --workdir."
            )
