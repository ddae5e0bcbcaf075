"""Checkpoints: state, data position and config under one step number, by Orbax."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.model import Decoder, parameter_shapes
from dynmoe_jax.training.step import decoder_structure
from dynmoe_jax.training.text import TOKENIZER_FILE

FOLDER = "checkpoints"

FREE_TO_CHANGE = (
    "checkpoint.", "evaluation.", "logging.", "loss.", "mesh.", "optimizer.",
    "train.steps", "train.log_every_steps", "train.microbatches", "train.max_skipped_in_a_row",
    "train.spike_", "train.collapse_steps", "train.compilation_cache", "data.directory",
    "data.max_broken_fraction", "data.tokenizer_megabytes",
    "model.dtype", "model.remat", "model.attention", "model.max_seq_len",
    "model.moe.backend", "model.moe.capacity_factor", "model.moe.rows_per_token",
    "model.moe.saved_rows_per_token",
)  # fmt: skip
"""Settings (or groups of them) that may differ between a checkpoint and the run that resumes."""


class Checkpoints:
    """The checkpoints of one run.  Saving is asynchronous; closing waits for it.

    Args:
      workdir: the run's folder.
      checkpoint: the settings; None to read only, which leaves alone what a run may be writing.
    """

    def __init__(self, workdir: Path, checkpoint: config.Checkpoint | None):
        if checkpoint is None:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
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

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, the newest first."""
        for later in reversed(self.steps()):
            if later > step:
                self._manager.delete(later)

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

    def params(self, step: int, params_like: nnx.State) -> nnx.State:
        """The parameters alone, placed like ``params_like``, without the optimizer's state."""
        like = {"params": params_like}
        args = ocp.args.PyTreeRestore(
            item=like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=True,
        )
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self.wait()
        self._manager.close()


def make_folder(workdir: Path) -> None:
    """Makes the run's folder.

    Raises:
      ConfigError: it cannot be made or written to.
    """
    try:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise config.ConfigError(
            f"--workdir={workdir} cannot be written ({error.strerror}); name another folder."
        ) from error


def saved_config(workdir: Path) -> config.Config | None:
    """The settings of the newest checkpoint in ``workdir``; None if there is none."""
    if not (workdir / FOLDER).is_dir():
        return None
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        step = checkpoints.latest_step()
        return None if step is None else checkpoints.config(step)


def check_compatible(saved: config.Config, current: config.Config, workdir: Path) -> None:
    """Raises ConfigError if the run in ``workdir`` cannot go on with other settings."""
    old = {path: value for path, _, value in config.walk(saved)}
    for path, _, value in config.walk(current):
        if value != old[path] and not path.startswith(FREE_TO_CHANGE):
            raise config.ConfigError(
                f"config.{path}={value!r} differs from {old[path]!r} of the checkpoint in "
                f"{workdir}; set it back, or start a new run with another --workdir."
            )


def load_run(workdir: Path | str) -> tuple[config.Config, Decoder, Tokenizer]:
    """A trained model, ready to use: the newest checkpoint of a run, on the first device.

    Args:
      workdir: the run's folder.

    Returns:
      the run's settings, its decoder and its tokenizer.

    Raises:
      ConfigError: there is no checkpoint in ``workdir``.
    """
    workdir = Path(workdir)
    if not (workdir / FOLDER).is_dir():
        raise config.ConfigError(f"{str(workdir)!r} holds no run; give the --workdir of one.")
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise config.ConfigError(f"{str(workdir)!r} holds no checkpoint yet; train it first.")
        cfg = checkpoints.config(step)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        params = checkpoints.params(step, jax.tree.map(place, parameter_shapes(cfg.model)))
    decoder = nnx.merge(decoder_structure(cfg.model), params)
    return cfg, decoder, Tokenizer.load(workdir / TOKENIZER_FILE)
