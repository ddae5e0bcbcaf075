"""A foreign model, of which what is asked for is read: as an opened run is."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.interop.architectures.mapping import ParameterSlice, fill
from dynmoe_jax.interop.architectures.mapping import Path as ParameterPath
from dynmoe_jax.interop.described import Described, describe
from dynmoe_jax.interop.files.source import open_source
from dynmoe_jax.runs.saving.streamed import Index


class ForeignModel:
    """Arrays of a foreign model, one slice of one parameter at a time.

    Args:
      described: the model.

    Attributes:
      described: the model.
      has_moments: False; a foreign model has none.
      updates: 0, for the same reason.
    """

    has_moments, updates = False, 0

    def __init__(self, described: Described):
        self.described = described
        self._slices: dict[ParameterPath, dict[str, ParameterSlice]] = defaultdict(dict)
        for name, ours in described.found.items():
            self._slices[ours.path][name] = ours

    @property
    def config(self) -> config.Config:
        """Settings of a run of the model."""
        return self.described.config

    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer; None if it has none."""
        return self.described.source.tokenizer()

    def axes(self, path: ParameterPath) -> int:
        """Leading axes of a parameter by which its tensors cut it."""
        return min(len(ours.leading) for ours in self._slices[path].values())

    def read(self, path: ParameterPath, index: Index = (), group: str = "params") -> np.ndarray:
        """Reads a slice of a parameter, float32.

        Args:
          path: of the parameter.
          index: numbers along its leading axes; empty for all of it.
          group: must be ``params``.
        """
        if group != "params":
            raise ValueError(f"A foreign model has no {group}.")
        # Of tensors that hold several slices one is cut out; the others are read in vain.
        outer = index[: self.axes(path)]
        inside = {
            name: dataclasses.replace(ours, index=ours.index[len(outer) :])
            for name, ours in self._slices[path].items()
            if ours.index[: len(outer)] == outer
        }
        values = np.empty(self.described.shapes[path][len(outer) :], np.float32)
        fill(inside, self.described.source.tensors(inside), {path: values})
        return values[index[len(outer) :]]

    def slices(self, path: ParameterPath) -> Iterator[tuple[int | None, np.ndarray]]:
        """Yields (index of the first axis, slice) of a parameter, or (None, all of it)."""
        if not self.axes(path):
            yield None, self.read(path)
            return
        for index in range(self.described.shapes[path][0]):
            yield index, self.read(path, (index,))


def opened_foreign(path: Path | str) -> ForeignModel:
    """Opens a folder in Hugging Face's format, or a GGUF file.

    Raises:
      CheckpointError: it is incomplete, or its architecture is not known.
    """
    return ForeignModel(describe(open_source(path)))
