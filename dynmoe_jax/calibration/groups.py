"""Groups of layers of a model on disk, whose parameters are read one group at a time."""

import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.model import Decoder, decoder_shapes
from dynmoe_jax.model.stacks import Stack, stacks_of
from dynmoe_jax.runs.load import OpenedRun
from dynmoe_jax.runs.saving.streamed import Index

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
    def layers(self) -> range:
        """Numbers of its layers in the decoder."""
        period = len(self.stack.run.period)
        first = self.stack.first + self.index * period
        return range(first, first + period)

    def read(self, run: OpenedRun) -> nnx.State:
        """Its parameters and router states, on the first device."""
        return _read(run, self.stack.name, self.shapes, (self.index,))


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
    return structure, _read(run, "norm", shapes)


def _read(run: OpenedRun, name: str, shapes: nnx.State, index: Index = ()) -> nnx.State:
    """The variables of a part of the decoder, on the first device.

    Args:
      run: to read from.
      name: of the part.
      shapes: of its variables.
      index: numbers along the leading axes of each.
    """
    read = [
        (path, leaf.replace(jnp.asarray(run.read((name, *path), index), leaf.dtype)))
        for path, leaf in shapes.flat_state()
    ]
    return nnx.from_flat_state(read)
