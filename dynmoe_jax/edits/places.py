"""Places of a model's arrays: by layer and expert, however layers are stacked.

Axis legend: N layers of a stack, E experts.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.mesh.axes import axes_of
from dynmoe_jax.model import variable_shapes
from dynmoe_jax.model.stacks import stacks_of

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """One array of a model: of a layer or outside of all, of an expert or whole.

    Attributes:
      layer: number in the decoder; None outside of layers.
      name: dotted path, in a layer from there on, such as ``feed_forward.down_EFD``.
      expert: number of the expert, of arrays whose name begins with E; None of all others.
    """

    layer: int | None
    name: str
    expert: int | None = None

    @property
    def array_name(self) -> str:
        """Name of the array itself, with its axes."""
        name = self.name.rsplit(".", 1)[-1]
        if self.expert is None:
            return name
        stem, axes = name.rsplit("_", 1)
        return f"{stem}_{axes.removeprefix('E')}"

    def at(self, layer: int | None) -> "Place":
        """The place of the same name in another layer."""
        return dataclasses.replace(self, layer=layer)


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a variable of a model is stored, and what it consists of.

    Attributes:
      path: of the variable in the state of a decoder.
      shape: of the whole variable.
      layers: numbers of the layers along its first axis; empty outside of layers.
      experts: length of its axis E where that is the first of a layer's array; else 0.
    """

    path: Path
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    experts: int

    @property
    def name(self) -> str:
        """Name as in :class:`Place`."""
        inside = self.path[3:] if self.layers else self.path
        return ".".join(map(str, inside))

    @property
    def leading(self) -> int:
        """Axes in front of the array of a place."""
        return int(bool(self.layers)) + int(bool(self.experts))

    def place(self, index: tuple[int, ...]) -> Place:
        """The place at an index of the leading axes."""
        layer = self.layers[index[0]] if self.layers else None
        return Place(layer, self.name, index[-1] if self.experts else None)

    def places(self) -> Iterator[Place]:
        """Yields all of them, in the order in which they are stored."""
        for index in np.ndindex(self.shape[: self.leading]):
            yield self.place(index)

    def index(self, place: Place) -> tuple[int, ...]:
        """The index of a place along the leading axes."""
        layer = (self.layers.index(place.layer),) if self.layers else ()
        return (*layer, place.expert) if self.experts else layer


@functools.lru_cache(maxsize=8)
def stored_in(model: config.Model) -> tuple[tuple[Stored, object], ...]:
    """All variables of a model, each with its leaf of shapes."""
    return tuple(_stored_in(model))


def _stored_in(model: config.Model) -> Iterator[tuple[Stored, object]]:
    stacks = {stack.name: stack for stack in stacks_of(model)}
    for path, leaf in variable_shapes(model).flat_state():
        stack = stacks.get(path[0])
        layers = tuple(stack.layers_at(path[2])) if stack else ()
        axes = axes_of(str(path[-1]))
        # A router's arrays have E too: last, twice, or alone.
        first = axes[:1] == ["E"] and axes.count("E") == 1 < len(axes)
        experts = leaf.shape[len(layers) > 0] if first else 0
        yield Stored(path, leaf.shape, layers, experts), leaf
