"""Where a foreign model is read from: a folder in Hugging Face's format, or a GGUF file."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynmoe_jax.data import Tokenizer, open_tokenizer
from dynmoe_jax.data.hf_files import holds_tokenizer
from dynmoe_jax.interop.gguf_file import GgufFile
from dynmoe_jax.interop.layouts import Shape
from dynmoe_jax.interop.tensor_files import read_json, read_tensors, tensor_files, tensor_shapes


class Source(Protocol):
    """A foreign model.  Its tensors have the names that Hugging Face gives them.

    Attributes:
      settings: what ``config.json`` holds, or would hold.
    """

    settings: Mapping[str, Any]

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if there is none.

        Raises:
          DataError, CheckpointError: it cannot be read.
        """

    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors by name; reads no tensor."""

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) of the wanted ones, one at a time."""


class HfFolder:
    """A folder with ``config.json`` and safetensors files: one, or several with an index."""

    def __init__(self, folder: Path):
        self.settings = read_json(folder / "config.json")
        self._folder = folder
        self._files = tensor_files(folder)
        self._file_of: dict[str, Path] = {}

    def tokenizer(self) -> Tokenizer | None:
        """The one that transformers reads from the folder's files."""
        return open_tokenizer(self._folder) if holds_tokenizer(self._folder) else None

    def shapes(self) -> dict[str, Shape]:
        """From the files' headers alone."""
        shapes = {}
        for file in self._files:
            found = tensor_shapes([file])
            shapes |= found
            self._file_of |= dict.fromkeys(found, file)
        return shapes

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """In the order of the files; a file is open while its tensors are read."""
        wanted = list(wanted)
        if not self._file_of:
            self.shapes()
        files = dict.fromkeys(self._file_of[name] for name in wanted)
        return read_tensors(files, wanted)


def open_source(path: str | os.PathLike) -> Source:
    """The model at ``path``: a ``.gguf`` file, or a folder in Hugging Face's format.

    Raises:
      CheckpointError: it is neither, is incomplete, or cannot be read.
    """
    path = Path(path).expanduser()
    return GgufFile(path) if path.suffix == ".gguf" else HfFolder(path)
