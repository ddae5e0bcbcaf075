"""A trained run, ready to use."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.data import Tokenizer, for_rows
from dynmoe_jax.data.sources.document import unusable
from dynmoe_jax.data.sources.files import shown
from dynmoe_jax.model import Decoder, decoder_structure, variable_shapes
from dynmoe_jax.model.masks import Mask
from dynmoe_jax.runs.checkpoint import FOLDER, IMPORTED, Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.recovery import damaged_sentence, newest_whole
from dynmoe_jax.runs.saving.moments import find_moments
from dynmoe_jax.runs.saving.stored import StoredArrays
from dynmoe_jax.runs.saving.streamed import Index
from dynmoe_jax.runs.text import load_tokenizer


def load_run(
    workdir: Path | str, *, best: bool = False, settings: Mapping[str, str] | None = None
) -> tuple[config.Config, Decoder, Tokenizer]:
    """A trained model, ready to use, on the first device.

    Args:
      workdir: the run's folder.
      best: take the checkpoint with the lowest held-out loss, if one has any, not the newest
        (see ``config.checkpoint.keep_best``).
      settings: other values of free settings of the model, such as how many experts a router that
        leaves it open uses at inference; see :func:`dynmoe_jax.config.with_free_settings`.

    Returns:
      the run's settings, its decoder and its tokenizer, which refuses text with an id that the
      model has no embedding of.

    Raises:
      ConfigError: there is no checkpoint in ``workdir``, or a setting cannot be changed.
      CheckpointError: none of its checkpoints can be read.
      DataError: the tokenizer is not the one that the model was trained with.
    """
    with opened_run(workdir, best=best, settings=settings) as run:
        tokenizer = for_rows(run.tokenizer(), run.config.model.vocab_size)
        return run.config, run.decoder(), tokenizer


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """One checkpoint of a run, of which what is asked for is read.

    Attributes:
      workdir: the run's folder.
      config: the run's settings, with the model of the step, but for those that were changed.
      step: of the checkpoint.
      checkpoints: all of the run.
    """

    workdir: Path
    config: config.Config
    step: int
    checkpoints: Checkpoints

    @property
    def imported(self) -> bool:
        """Whether no step of training was done here: the model is somebody else's, or was made
        from others."""
        return IMPORTED in self.checkpoints.position(self.step)

    @property
    def has_moments(self) -> bool:
        """Whether AdamW's moments are in it."""
        return "first" in self._groups

    @property
    def updates(self) -> int:
        """Updates that went into the moments; 0 without any."""
        return int(self._stored.read(self._groups["count"])) if self.has_moments else 0

    def decoder(self) -> Decoder:
        """The model, on the first device."""
        params = self.params(variable_shapes(self.config.model))
        return nnx.merge(decoder_structure(self.config.model), params)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises DataError if it is not the one that the model was trained with."""
        return load_tokenizer(self.workdir, self.checkpoints.position(self.step))

    def read(self, path: tuple, index: Index = (), group: str = "params") -> np.ndarray:
        """Reads a slice of a parameter from disk, in float32 whatever is stored.

        Args:
          path: of the parameter.
          index: numbers along its leading axes; empty for all of it.
          group: ``params``, or ``first`` or ``second``: its moments.

        Raises:
          CheckpointError: there is no such array, or it cannot be read.
        """
        name = self._name(path, group)
        with self._readable():
            return self._stored.read(name, index)

    def shape(self, path: tuple, group: str = "params") -> tuple[int, ...] | None:
        """Shape of a parameter, or of its moments, as it is stored; None if it is not."""
        try:
            name = self._name(path, group)
        except CheckpointError:
            return None
        with self._readable():
            return self._stored.shape(name)

    def slices(self, path: tuple) -> Iterator[tuple[int | None, np.ndarray]]:
        """A parameter in parts, see :meth:`.saving.stored.StoredArrays.slices`."""
        name = self._name(path, "params")
        with self._readable():
            yield from self._stored.slices(name)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turns TensorStore's errors into one sentence."""
        try:
            yield
        except (OSError, ValueError) as error:
            folder = self.checkpoints.folder(self.step)
            why = "has changed" if folder.is_dir() else "is not there any more"
            raise CheckpointError(
                f"The checkpoint {folder} {why} since it was opened; start again, when nobody else "
                "writes there."
            ) from error

    def params(self, shapes: nnx.State) -> nnx.State:
        """All variables, on the first device; ``shapes`` as :func:`variable_shapes` gives."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        return self.checkpoints.params(self.step, jax.tree.map(shaped, shapes))

    @cached_property
    def _stored(self) -> StoredArrays:
        return StoredArrays(self.checkpoints.folder(self.step) / "state")

    @cached_property
    def _groups(self) -> dict[str, str]:
        """Dotted name of each group of arrays."""
        return {"params": "params", **find_moments(self._stored.names)}

    def _name(self, path: tuple, group: str) -> str:
        name = ".".join(map(str, (self._groups.get(group, group), *path)))
        if name not in self._stored:
            folder = self.checkpoints.folder(self.step)
            raise CheckpointError(f"The checkpoint {folder} holds no array {name}.")
        return name


@contextlib.contextmanager
def opened_run(
    workdir: Path | str,
    *,
    best: bool = False,
    settings: Mapping[str, str] | None = None,
    verify: bool = True,
) -> Iterator[OpenedRun]:
    """Opens the checkpoint that :func:`load_run` reads; arguments and errors as there.

    Without ``verify`` it is not read as a whole to find damage: it was written a moment ago.
    """
    workdir = Path(workdir)
    if unusable(str(workdir)):
        raise config.ConfigError(
            f"'{shown(workdir)}' is no name in UTF-8, which checkpoints need; rename the folder."
        )
    if not (workdir / FOLDER).is_dir():
        raise config.ConfigError(f"{str(workdir)!r} holds no run; give the --workdir of one.")
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        step, damaged = newest_whole(checkpoints) if verify else (checkpoints.latest_step(), {})
        if step is None:
            raise config.ConfigError(f"{str(workdir)!r} holds no checkpoint yet; train it first.")
        for bad, damage in damaged.items():
            warn(damaged_sentence(bad, damage, step))
        if best:
            step = checkpoints.best_step() or step
        cfg = config.settings_at(checkpoints.config(step), step)
        cfg = config.with_free_settings(cfg, settings or {})
        yield without_full_masks(OpenedRun(workdir, cfg, step, checkpoints))


def without_full_masks(run: OpenedRun) -> OpenedRun:
    """The same run; a model whose masks are all 1 as one that has none, which computes the same."""
    model = run.config.model
    if not model.mask_steps:
        return run
    variables = variable_shapes(model).flat_state()
    masks = [path for path, leaf in variables if isinstance(leaf, Mask)]
    if not all(run.shape(path) is not None and (run.read(path) == 1).all() for path in masks):
        return run
    model = dataclasses.replace(model, mask_steps=0)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
