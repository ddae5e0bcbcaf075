"""Parents of an operation: runs, and foreign models, read one array at a time."""

import contextlib
import functools
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer, find_tokenizer
from dynmoe_jax.edits.places import Place, Stored, stored_in
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.interop.files.tensor_files import tensor_files
from dynmoe_jax.interop.foreign import ForeignModel, opened_foreign
from dynmoe_jax.interop.load import load_hf
from dynmoe_jax.model import Decoder
from dynmoe_jax.model.masks import Kept
from dynmoe_jax.runs.checkpoint import FOLDER
from dynmoe_jax.runs.load import OpenedRun, opened_run
from dynmoe_jax.surgery.report.provenance import FILE_NAME, read_record
from dynmoe_jax.surgery.storage.digest import Digest

_KEPT_ARRAYS = 8
"""Arrays that are kept after they were read: experts are made of one feed-forward, one after
another, while other arrays are made between them."""


class Parent:
    """A model to be read.

    Args:
      folder: as the user named it.
      model: an opened run, or an opened foreign model.

    Attributes:
      folder: as the user named it.
      config: its settings.
      model: what was opened: ``read(path, index, group)`` gives arrays.
    """

    def __init__(self, folder: Path, model: OpenedRun | ForeignModel):
        self.folder, self.model, self.config = folder, model, model.config
        self._stored: dict[str, list[Stored]] = {}
        self._states: set[str] = set()
        for stored, leaf in stored_in(self.config.model):
            self._stored.setdefault(stored.name, []).append(stored)
            if isinstance(leaf, Kept):
                self._states.add(stored.name)
        self._kept: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._digest = Digest()

    @property
    def is_foreign(self) -> bool:
        """Whether it is no run of ours."""
        return isinstance(self.model, ForeignModel)

    @property
    def has_moments(self) -> bool:
        """Whether an optimizer's moments are stored with it."""
        return self.model.has_moments

    def read(self, place: Place, role: Role = Role.PARAMETER) -> np.ndarray:
        """The array of a place, float32."""
        key = (place, role)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        stored = self._at(place)
        if role is Role.PARAMETER or self.model.shape(stored.path, role.value):
            values = self.model.read(stored.path, stored.index(place), role.value)
        else:  # it was not trained, and has no moments
            values = np.zeros(stored.shape[stored.leading :], np.float32)
        # Kept for others, who may not change it.
        values.flags.writeable = False
        if role is Role.PARAMETER and place not in self._digest:
            self._digest.add(place, role, values)
        self._kept[key] = values
        while len(self._kept) > _KEPT_ARRAYS:
            self._kept.popitem(last=False)
        return values

    def forget(self) -> None:
        """Drops arrays that are kept for whoever asks next: nobody does."""
        self._kept.clear()

    def _at(self, place: Place) -> Stored:
        for stored in self._stored.get(place.name, ()):
            if place.layer is None or place.layer in stored.layers:
                return stored
        raise KeyError(f"{self.folder} has no {place}")

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None if it has none."""
        if self.is_foreign or find_tokenizer(self.folder):
            return self.model.tokenizer()
        return None

    def files(self) -> list[Path]:
        """Files that hold its numbers."""
        if not self.is_foreign:
            return files_of(self.model)
        if self.folder.is_file():
            return [self.folder]
        return sorted(set(tensor_files(self.folder).values()))

    def decoder(self) -> Decoder:
        """The whole model, in memory."""
        return load_hf(self.folder) if self.is_foreign else self.model.decoder()

    @property
    def updates(self) -> int:
        """Updates that went into its moments; 0 without any."""
        return self.model.updates

    @functools.cached_property
    def digest(self) -> str:
        """Digest of all its parameters and router states, see :class:`.digest.Digest`.

        What was read before is not read again.
        """
        for all_stored in self._stored.values():
            for stored in all_stored:
                for place in stored.places():
                    if place not in self._digest:
                        self.read(place)
        return self._digest.hex()

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Operations that made it, the oldest first."""
        if not os.path.isfile(self.folder / FILE_NAME):
            return []
        record = read_record(self.folder)
        newest = {name: record.get(name) for name in ("operation", "settings", "digest")}
        return [*record.get("history", []), newest]


def files_of(run: OpenedRun) -> list[Path]:
    """Files that hold the numbers of a run's checkpoint, moments included."""
    state = run.checkpoints.folder(run.step) / "state"
    return sorted(path for path in state.rglob("*") if path.is_file())


@contextlib.contextmanager
def opened_parent(folder: Path) -> Iterator[Parent]:
    """Opens a run's folder, a folder in Hugging Face's format, or a GGUF file.

    Raises:
      ConfigError: there is none.
      CheckpointError: it cannot be read.
    """
    # Unlike Path's, these say no to a name that is too long.
    folder = Path(os.path.expanduser(folder))
    if os.path.isdir(folder / FOLDER):
        with opened_run(folder) as run:
            yield Parent(folder, run)
    elif os.path.isfile(folder) or os.path.isfile(folder / "config.json"):
        yield Parent(folder, opened_foreign(folder))
    else:
        raise config.ConfigError(
            f"--from={folder} is no run's folder, no folder with a config.json, and no GGUF file."
        )
