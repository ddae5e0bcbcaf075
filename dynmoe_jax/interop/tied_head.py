"""Tied embeddings of which a file holds the output projection too, or it alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.files.source import Source
from dynmoe_jax.runs.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""As all architectures name them."""


def untied(source: Source) -> Source:
    """A tied model's tensors with one matrix for both ends of it, under the embedding's name.

    Raises:
      CheckpointError: there are two, and they differ.
    """
    shapes = source.shapes()
    if HEAD not in shapes:
        return source
    if EMBEDDING not in shapes:
        return _Single(source, HEAD)
    is_matrix = len(shapes[EMBEDDING]) == 2  # otherwise refused with other shapes
    if shapes[EMBEDDING] != shapes[HEAD] or (is_matrix and not source.are_equal(EMBEDDING, HEAD)):
        raise CheckpointError(
            f"config.json has tie_word_embeddings=true, but {HEAD} differs from {EMBEDDING}; set "
            "it to false to keep both."
        )
    return _Single(source, EMBEDDING)


class _Single:
    """A source whose embedding is the tensor ``name``, and which has no output projection."""

    def __init__(self, source: Source, name: str):
        self._source, self._name = source, name
        self.settings: Mapping[str, Any] = source.settings

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()

    def shapes(self) -> dict[str, Shape]:
        shapes = self._source.shapes()
        embedding = shapes[self._name]
        return {n: s for n, s in shapes.items() if n != HEAD} | {EMBEDDING: embedding}

    def tensors(self, wanted: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        theirs = [self._name if name == EMBEDDING else name for name in wanted]
        for name, tensor in self._source.tensors(theirs):
            yield EMBEDDING if name == self._name else name, tensor

    def are_equal(self, one: str, other: str) -> bool:
        return self._source.are_equal(one, other)
