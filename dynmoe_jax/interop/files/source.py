"""Sources of foreign models: a folder in Hugging Face's format, or a GGUF file."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynmoe_jax.data import Tokenizer, open_tokenizer
from dynmoe_jax.data.tokenizers.endings import GENERATION, named_ends
from dynmoe_jax.data.tokenizers.hf_files import holds_tokenizer
from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.files.gguf_file import MAGIC, GgufFile
from dynmoe_jax.interop.files.tensor_files import (
    read_json,
    read_tensors,
    tensor_files,
    tensor_shapes,
    tensors_are_equal,
)
from dynmoe_jax.runs.errors import CheckpointError


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

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices of one shape hold the same numbers."""


class HfFolder:
    """A folder with ``config.json`` and safetensors files: one, or several with an index."""

    def __init__(self, folder: Path):
        self.settings = read_json(folder / "config.json")
        self._folder = folder
        self._file_of = tensor_files(folder)

    def tokenizer(self) -> Tokenizer | None:
        """The one that transformers reads from the folder's files.

        Where no ``generation_config.json`` says which tokens end a text, ``config.json`` does.
        """
        if not holds_tokenizer(self._folder):
            return None
        tokenizer = open_tokenizer(self._folder)
        ends = named_ends(self.settings, "config.json")
        if (self._folder / GENERATION).is_file() or set(ends) <= set(tokenizer.end_ids):
            return tokenizer
        return tokenizer.with_ends(ends)

    def shapes(self) -> dict[str, Shape]:
        """Shapes by name, from the files' headers alone."""
        return tensor_shapes(self._file_of)

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """File by file; a file is open while its tensors are read."""
        return read_tensors(self._file_of, wanted)

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two matrices of one shape hold the same numbers."""
        return tensors_are_equal(self._file_of, (one, other))


def open_source(path: str | os.PathLike) -> Source:
    """The model at ``path``: a ``.gguf`` file, or a folder in Hugging Face's format.

    Raises:
      CheckpointError: it is neither, is incomplete, or cannot be read.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return GgufFile(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no folder and no GGUF file.")
        return GgufFile(path)
    return HfFolder(path)
