"""Where a foreign model is read from: a folder in Hugging Face's format, or a GGUF file."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynmoe_jax.interop.gguf_file import GgufFile
from dynmoe_jax.interop.layouts import Shape
from dynmoe_jax.interop.tensor_files import read_json, read_tensors, tensor_files, tensor_shapes


class Source(Protocol):
    """A foreign model.  Its tensors have the names that Hugging Face gives them.

    Attributes:
      settings: what ``config.json`` holds, or would hold.
    """

    settings: Mapping[str, Any]

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors by name; reads no tensor."""

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) of the wanted ones, one at a time."""


class HfFolder:
    """A folder with ``config.json`` and safetensors files: one, or several with an index."""

    def __init__(self, folder: Path):
        self.settings = read_json(folder / "config.json")
        self._files = tensor_files(folder)

    def shapes(self) -> dict[str, Shape]:
        """From the files' headers alone."""
        return tensor_shapes(self._files)

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """In the order of the files."""
        return read_tensors(self._files, wanted)


def open_source(path: str | os.PathLike) -> Source:
    """The model at ``path``: a ``.gguf`` file, or a folder in Hugging Face's format.

    Raises:
      CheckpointError: it is neither, is incomplete, or cannot be read.
    """
    path = Path(path).expanduser()
    return GgufFile(path) if path.suffix == ".gguf" else HfFolder(path)
