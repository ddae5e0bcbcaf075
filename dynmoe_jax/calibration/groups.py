"""Groups of layers of a model on disk, whose parameters are read one group at a time."""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder, decoder_shapes
from dynmoe_jax.model.stacks import Stack, stacks_of
from dynmoe_jax.runs.load import OpenedRun

shapes_of = functools.lru_cache(maxsize=4)(decoder_shapes)
"""A decoder of shapes in place of arrays, made once for a model."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One repetition of the period of a stack.

    Attributes:
      stack: which.
      index: of the repetition in it.
      structure: of its layers.
      shapes: of its parameters, in the whole stack.
    """

    stack: Stack
    index: int
    structure: nnx.GraphDef
    shapes: nnx.State

    @property
    def first(self) -> int:
        """Number of its first layer in the decoder."""
        return self.stack.first + self.index * self.length

    @property
    def length(self) -> int:
        """Number of its layers."""
        return len(self.stack.run.period)

    def read(self, run: OpenedRun) -> nnx.State:
        """Its parameters and router states, on the first device."""
        read = [
            (path, leaf.replace(_cast(_slice(run, (self.stack.name, *path), self.index), leaf)))
            for path, leaf in self.shapes.flat_state()
        ]
        return nnx.from_flat_state(read)


def groups_of(model: config.Model) -> Iterator[Group]:
    """Yields all groups of layers, in the order of computation."""
    decoder: Decoder = shapes_of(model)
    for stack in stacks_of(model):
        structure, shapes = nnx.split(getattr(decoder, stack.name))
        for index in range(stack.run.repeats):
            yield Group(stack, index, structure, shapes)


def read_norm(run: OpenedRun) -> tuple[nnx.GraphDef, nnx.State]:
    """(structure, parameters) of the norm behind all layers."""
    structure, shapes = nnx.split(shapes_of(run.config.model).norm)
    read = [
        (path, leaf.replace(_cast(read_whole(run, ("norm", *path)), leaf)))
        for path, leaf in shapes.flat_state()
    ]
    return structure, nnx.from_flat_state(read)


def read_whole(run: OpenedRun, path: tuple) -> np.ndarray:
    """All of a parameter, as it is stored."""
    parts = list(run.slices(path))
    if parts[0][0] is None:
        return parts[0][1]
    return np.stack([values for _, values in parts])


def _slice(run: OpenedRun, path: tuple, index: int) -> np.ndarray:
    """What stands at an index of the first axis of a parameter."""
    for found, values in run.slices(path):
        if found is None:
            # A copy: a view would keep the whole.
            return np.array(values[index])
        if found == index:
            return values
    raise IndexError(index)


def _cast(values: np.ndarray, leaf: nnx.Variable) -> jnp.ndarray:
    return jnp.asarray(values, leaf.dtype)
