"""Mapping of foreign tensors to slices of our parameters, by a table of rules, and back.

Our layers are stacked and our experts are one array, so most foreign tensors are slices: layer i
lives at index ``i // n`` of the stack of member ``i % n`` of the scanned group of n layers.  Dense
layers before all others are a stack of their own.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.layouts import LINEAR, Layout, Shape
from dynmoe_jax.runs.errors import CheckpointError

Path = tuple[str | int, ...]
GATE, UP = 0, 1
"""Index of each half of a fused gate-up parameter [..., 2F]."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of an architecture's table.

    Attributes:
      name: foreign name; ``{layer}`` and ``{expert}`` stand for numbers.
      parameter: dotted path of ours, from the layer on if ``name`` holds ``{layer}``.  A rule
        applies where the parameter exists: an MoE layer has no dense feed-forward.
      layout: between the tensor and our slice.
      half: GATE or UP if our slice is one half of a fused gate-up parameter.
    """

    name: str
    parameter: str
    layout: Layout = LINEAR
    half: int | None = None


@dataclasses.dataclass(frozen=True)
class ParameterSlice:
    """One foreign tensor among our parameters: the slice ``index`` of the parameter at ``path``."""

    path: Path
    index: tuple[Any, ...]
    layout: Layout

    @property
    def leading(self) -> tuple[int, ...]:
        """The numbers in the index, which stand before all else: of the layer, of the expert."""
        return tuple(i for i in self.index if isinstance(i, int))

    def shape(self, shapes: Mapping[Path, Shape]) -> Shape:
        """Shape of our slice."""
        halves = [i for i in self.index if isinstance(i, slice)]
        shape = shapes[self.path][len(self.leading) :]
        return (*shape[:-1], halves[0].stop - halves[0].start) if halves else shape


def parameter_slices(
    rules: Iterable[Rule], model: config.Model, shapes: Mapping[Path, Shape]
) -> dict[str, ParameterSlice]:
    """The slice of every foreign tensor of a model, by foreign name.

    Args:
      rules: the architecture's table.
      model: the settings of the model.
      shapes: shapes of our parameters, by path.

    Raises:
      CheckpointError: the architecture has no place for one of our parameters.
    """
    found = {}
    for rule in rules:
        layers = range(model.num_layers) if "{layer}" in rule.name else [None]
        for layer in layers:
            path, index = _locate(rule, layer, model)
            if path not in shapes:
                continue
            experts = range(shapes[path][len(index)]) if "{expert}" in rule.name else [None]
            for expert in experts:
                name = rule.name.format(layer=layer, expert=expert)
                found[name] = ParameterSlice(
                    path, _index(index, expert, rule.half, shapes[path]), rule.layout
                )
    for path in shapes.keys() - {ours.path for ours in found.values()}:
        raise CheckpointError(f"{'.'.join(map(str, path))} has no place in this architecture.")
    return found


def _locate(rule: Rule, layer: int | None, model: config.Model) -> tuple[Path, tuple[int, ...]]:
    """Path of the parameter, and the index into its stack if it has one."""
    path = tuple(rule.parameter.split("."))
    if layer is None:
        return path, ()
    first = model.moe.dense_first_layers
    if layer < first:
        return ("first_groups", "layers", 0, *path), (layer,)
    group, member = divmod(layer - first, model.moe.every_n_layers or 1)
    return ("groups", "layers", member, *path), (group,)


def _index(
    stack: tuple[int, ...], expert: int | None, half: int | None, shape: Shape
) -> tuple[Any, ...]:
    index = stack if expert is None else (*stack, expert)
    if half is None:
        return index
    width = shape[-1] // 2
    return (*index, ..., slice(half * width, (half + 1) * width))


def fill(
    found: Mapping[str, ParameterSlice],
    tensors: Iterable[tuple[str, np.ndarray]],
    parameters: Mapping[Path, np.ndarray],
) -> None:
    """Writes foreign tensors to their slices of ``parameters``, one at a time."""
    for name, tensor in tensors:
        ours = found[name]
        target = parameters[ours.path]
        target[ours.index] = ours.layout.to_ours(tensor, target[ours.index].shape)
