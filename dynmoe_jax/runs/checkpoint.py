"""Checkpoints: state, data position and config under one step number, by Orbax.

A checkpoint is written beside its place and renamed when all of it, the list of checksums
(:mod:`.saving.integrity`) included, is there: whoever is killed while saving leaves no half of one.

Of several processes each writes its arrays; process 0 writes the rest, renames, and deletes.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.model.masks import MASK_NAMES
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.saving.chunks import save_args
from dynmoe_jax.runs.saving.integrity import replace_checksum, write_checksums
from dynmoe_jax.runs.saving.pace import Pace, paced_types
from dynmoe_jax.runs.saving.retention import (
    METRIC,
    BeforeDecay,
    heldout_loss,
    keep_policy,
    save_policy,
)
from dynmoe_jax.runs.saving.snapshot import Snapshot

FOLDER = "checkpoints"
ITEMS = ("state", "data", "config")
CONFIG_FILE = "config/metadata"
"""File in which Orbax keeps the settings of a checkpoint."""

IMPORTED = "imported"
"""Key that stands in place of a position in the data: what the model was imported from."""

_CLOCK_STEPS = 10
"""Several processes agree every so many steps on what the clock of process 0 says."""


class Checkpoints:
    """The checkpoints of one run.  Saving is asynchronous; closing waits for it.

    Args:
      workdir: the run's folder.
      checkpoint: the settings; None to read only, which leaves alone what a run may be writing, and
        which one of several processes may do by itself.

    Raises (saving, closing and whatever waits for them):
      CheckpointError: a checkpoint could not be written, e.g. because the disk is full.
    """

    def __init__(self, workdir: Path, checkpoint: config.Checkpoint | None):
        self._workdir, self._settings = workdir, checkpoint
        self._saving: int | None = None
        self._before_decay = BeforeDecay()
        self._pace, self._snapshot = Pace.of_this_machine(), Snapshot()
        logging.getLogger("absl").addFilter(_tells_news)
        best = {"best_fn": heldout_loss, "best_mode": "min"}
        if checkpoint is None:
            options = ocp.CheckpointManagerOptions(
                create=False, multiprocessing_options=_alone(), **best
            )
        else:
            options = ocp.CheckpointManagerOptions(
                save_decision_policy=save_policy(checkpoint),
                preservation_policy=keep_policy(checkpoint, self._before_decay),
                cleanup_tmp_directories=True,
                # Called when all is written but not yet renamed.
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._list_files),
                **best,
            )
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=options,
            item_names=ITEMS,
            item_handlers={"state": self._state_handler()}
            | {item: ocp.JsonCheckpointHandler() for item in ITEMS if item != "state"},
        )

    def folder(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self._workdir / FOLDER / str(step)

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._manager.reload()

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

    def best_step(self) -> int | None:
        """Step of the kept checkpoint with the lowest held-out loss; None if none has one."""
        best = self._manager.best_step()
        return best if best is not None and METRIC in (self._manager.metrics(best) or {}) else None

    def keep_before_decay(self, step: int) -> None:
        """Has a checkpoint of a step written, after which the learning rate falls, and the newest
        one up to it kept."""
        self._before_decay.step = step

    def due(self, step: int) -> bool:
        """Whether the settings ask for a checkpoint after this step.

        Every process has to ask at every step: where clocks have a say, process 0 decides.
        """
        if step == self._before_decay.step:
            return True
        every = self._settings.every_steps
        if not agreement.has_peers() or not self._settings.every_minutes:
            return self._manager.should_save(step)
        if (every and step % every == 0) or step % _CLOCK_STEPS:
            return bool(every) and step % every == 0
        return agreement.on_first(lambda: self._manager.should_save(step))

    def reached_preemption(self, step: int) -> bool:
        """Whether the machines of a distributed run will be taken away: all hosts say yes at the
        same step.  Only where ``jax.distributed`` is initialised."""
        return self._manager.reached_preemption(step)

    def save(
        self,
        step: int,
        state: Any,
        data: dict,
        cfg: config.Config,
        loss: float | None = None,
    ) -> None:
        """Saves once per step, without waiting for the disk.

        Args:
          step: steps done.
          state: a tree of arrays, or of :class:`.saving.streamed.StreamedArray`.
          data: position in the data, JSON-able.
          cfg: all settings.
          loss: held-out loss of this state, if it was evaluated.
        """
        if step == self.latest_step():
            return
        self.wait()  # whatever has gone wrong until here is not this step's
        self._saving = step
        if self._pace.pauses and all(isinstance(x, jax.Array) for x in jax.tree.leaves(state)):
            state = self._snapshot.of(state)
            self._pace.begin(sum(x.nbytes for x in jax.tree.leaves(state)))
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree.map(save_args, state)),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(config.to_dict(cfg)),
        )
        with self._written():
            self._manager.save(
                step, args=items, metrics={} if loss is None else {METRIC: loss}, force=True
            )

    @contextlib.contextmanager
    def saving(self, step: int, last: bool, save: Callable[[], None]) -> Iterator[None]:
        """Saves a step at the end of a block, if it is due, whatever happens in the block.

        An evaluation that fails does not cost the step.  Only where other processes save together
        with this one it is not saved then: they would wait for one that never comes.

        Args:
          step: steps done.
          last: whether it is the run's last, which is always saved.
          save: calls :meth:`save`.
        """
        try:
            yield
        except BaseException:
            if not agreement.has_peers() and (last or self.due(step)):
                save()
            raise
        if last or self.due(step):
            save()

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raises CheckpointError if the last save has failed; doesn't wait for one under way."""
        if not self.is_saving():
            self.wait()

    def config(self, step: int) -> config.Config:
        """The settings that a checkpoint was written with."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return config.from_stored(self._read(step, args)["config"])

    def position(self, step: int) -> dict:
        """The position in the data that a checkpoint was written at."""
        return self._read(step, ocp.args.Composite(data=ocp.args.JsonRestore()))["data"]

    def restore(self, step: int, state_like: Any) -> tuple[Any, dict]:
        """(state, data position) of a checkpoint, placed like ``state_like``.

        Args:
          step: which checkpoint.
          state_like: a tree of arrays or of ShapeDtypeStructs with shardings.
        """
        self._check_all_asked_for(step, state_like)
        self._check_all_stored(step, state_like)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state_like)
        # In part: groups without arrays, of which an older checkpoint has fewer, are no matter.
        state = _restore(like, partial_restore=True)
        args = ocp.args.Composite(state=state, data=ocp.args.JsonRestore())
        restored = self._read(step, args)
        return restored["state"], restored["data"]

    def params(self, step: int, params_like: nnx.State) -> nnx.State:
        """The parameters alone, placed like ``params_like``, without the optimizer's state.

        Masks may be left out: whoever opens a model leaves out those that are all 1.
        """
        like = {"params": params_like}
        self._check_all_asked_for(step, like, within="params", but=MASK_NAMES)
        return self.part(step, like)["params"]

    def part(self, step: int, like: Any) -> Any:
        """Arrays of the state that ``like`` has, placed like there."""
        args = _restore(like, partial_restore=True)
        return self._read(step, ocp.args.Composite(state=args))["state"]

    def _check_all_asked_for(
        self, step: int, like: Any, within: str = "", but: Sequence[str] = ()
    ) -> None:
        """Raises CheckpointError for stored arrays that would be left out without a word."""
        stored = {name for name in self._stored(step) if name.startswith(within)}
        left_out = stored - _array_names(like)
        left_out = sorted(name for name in left_out if name.rpartition(".")[2] not in but)
        if left_out:
            raise CheckpointError(
                f"The checkpoint {self.folder(step)} holds {', '.join(left_out)}, which the model "
                "of its settings does not have; restore the settings that it was trained with."
            )

    def _check_all_stored(self, step: int, like: Any) -> None:
        """Raises CheckpointError for arrays that are not stored."""
        lacks = sorted(_array_names(like) - self._stored(step))
        if lacks:
            raise CheckpointError(
                f"The checkpoint {self.folder(step)} lacks {', '.join(lacks)}, which the settings "
                "ask for; restore the settings that it was trained with."
            )

    def _stored(self, step: int) -> set[str]:
        """Dotted names of the arrays of a checkpoint."""
        with self._readable(step):
            return _array_names(self._manager.item_metadata(step)["state"].tree)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._written(), self._pace.waited_for():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _list_files(self) -> None:
        """Writes the checksums of the checkpoint that is being saved; runs in Orbax's thread."""
        unnamed = f"{self._saving}.orbax-checkpoint-tmp"
        # Not by glob, which keeps the patterns of the last 128 saves.
        folders = (self._workdir / FOLDER).iterdir()
        found = (folder for folder in folders if folder.name.startswith(unnamed))
        write_checksums(next(found, self.folder(self._saving)), self._pace.after_summing)

    def _state_handler(self) -> ocp.PyTreeCheckpointHandler:
        # Compression hardly makes normal float32 smaller (docs/measurements.md: save-compression),
        # and takes from the steps that run meanwhile.
        options = {"type_handler_registry": paced_types(self._pace)} if self._pace.pauses else {}
        return ocp.PyTreeCheckpointHandler(use_compression=False, **options)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns what goes wrong while saving into one sentence.

        Orbax passes on errors of many kinds, some as TensorStore's text.
        """
        try:
            yield
        except Exception as error:
            last = max((s for s in self.steps() if s != self._saving), default=None)
            kept = f"the one of step {last:,} is whole" if last else "there is none before it"
            raise CheckpointError(
                f"The checkpoint of step {self._saving:,} in {self._workdir / FOLDER} could not be "
                f"written ({_shortly(error)}); {kept}; make room or repair the disk, and start the "
                "same command again."
            ) from error

    def _read(self, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
        with self._readable(step):
            return self._manager.restore(step, args=args)

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        """Turns an error of reading a checkpoint into one sentence."""
        try:
            yield
        except Exception as error:
            folder = self.folder(step)
            raise CheckpointError(
                f"The checkpoint {folder} cannot be read ({_shortly(error)}); move it away to go "
                "on from the one before."
            ) from error


def replace_config(workdir: Path, step: int, cfg: config.Config) -> None:
    """Gives a checkpoint other settings, such as one that was chosen with its arrays at hand.

    Args:
      workdir: a folder that nobody else reads or writes.
      step: of the checkpoint.
      cfg: settings of a model with the same arrays.
    """
    folder = workdir / FOLDER / str(step)
    (folder / CONFIG_FILE).write_text(json.dumps(config.to_dict(cfg)), encoding="utf-8")
    replace_checksum(folder, CONFIG_FILE)


def _array_names(tree: Any) -> set[str]:
    """Dotted paths; a parameter saved within a dataclass has a key "value" more than in a dict."""
    return {name.removesuffix(".value") for name in ocp.tree.to_flat_dict(tree, sep=".")}


def _alone() -> ocp.options.MultiprocessingOptions:
    """Options for reading without the other processes of the run."""
    if not agreement.has_peers():
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def _restore(like: Any, **options: Any) -> ocp.args.PyTreeRestore:
    """Options for reading a tree: shapes, types and shardings as in ``like``."""
    placed = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=placed, **options)


def _shortly(error: Exception, most: int = 300) -> str:
    """An error in one line; TensorStore's say at the end what the matter is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:100]} … {text[100 - most :]}"


def _tells_news(record: logging.LogRecord) -> bool:
    """Filters Orbax's log: tracebacks, of which we make a sentence, and notes that waiting for a
    save took its time."""
    return not record.exc_info and "previous save to complete" not in str(record.msg)
