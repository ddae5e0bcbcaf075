"""A foreign model as its configuration and its files' headers describe it; reads no tensor."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.architectures.mapping import ParameterSlice, Path, parameter_slices
from dynmoe_jax.interop.architectures.registry import architecture_of
from dynmoe_jax.interop.files.source import Source
from dynmoe_jax.interop.quoted import named, shown
from dynmoe_jax.interop.tied_head import untied
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.errors import CheckpointError

_COUNTED = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
"""Settings of which each one has tensors of its own."""


@dataclasses.dataclass(frozen=True)
class Described:
    """A foreign model of which everything but the numbers is known and agrees.

    Attributes:
      source: where its tensors are read from.
      architecture: the foreign one.
      config: settings of a run of the model, by default but for the model's own.
      shapes: shapes of our parameters, by path.
      found: the slice of each foreign tensor that is read.
    """

    source: Source
    architecture: Architecture
    config: config.Config
    shapes: dict[Path, Shape]
    found: dict[str, ParameterSlice]


def describe(source: Source, overrides: Mapping[str, Any] | None = None) -> Described:
    """Compares a model's configuration with its tensors.

    Args:
      source: the foreign model.
      overrides: fields of :class:`config.Model` or of :class:`config.MoE` to set.

    Raises:
      CheckpointError: the architecture is not known, cannot be computed here, or a tensor is
        unknown, missing or of another shape than the configuration says.
      ConfigError: an override does not exist, or a setting is of the wrong type or out of range.
    """
    given = source.shapes()
    architecture, cfg = configured(source.settings, len(given), overrides)
    shapes = _parameter_shapes(cfg.model)
    found = parameter_slices(architecture.rules, cfg.model, shapes)
    if cfg.model.tie_embeddings:
        source = untied(source)
        given = source.shapes()
    _check_tensors(found, shapes, given, architecture, cfg.model)
    return Described(source, architecture, cfg, shapes, found)


def configured(
    settings: Mapping[str, Any], tensors: int, overrides: Mapping[str, Any] | None = None
) -> tuple[Architecture, config.Config]:
    """(architecture, settings of a run) of what a ``config.json`` holds.

    Args:
      settings: what it holds.
      tensors: number of tensors that there are.
      overrides: as above.

    Raises:
      CheckpointError, ConfigError: as above, but for what is wrong with tensors.
    """
    _check_size(settings, tensors)
    architecture = architecture_of(settings)
    return architecture, _config_of(architecture.model_from_hf(settings), overrides or {})


def _check_size(settings: Mapping[str, Any], tensors: int) -> None:
    """Raises CheckpointError for names and counts that no model of so many tensors can have."""
    names = settings.get("architectures")
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"config.json has architectures={shown(names)}, no list of names.")
    for name in _COUNTED:
        value = settings.get(name)
        if type(value) is int and value > tensors:
            raise CheckpointError(
                f"config.json has {name}={shown(value)}, but there are {tensors} tensors in all."
            )


def _config_of(model: config.Model, overrides: Mapping[str, Any]) -> config.Config:
    """A run of the model with some settings changed, all of them checked.

    Raises:
      ConfigError: a name does not exist, or a setting has the wrong type, is out of range, or
        contradicts another.
    """
    settings = config.to_dict(model)
    for name, value in overrides.items():
        group = settings if name in settings else settings["moe"]
        if name not in group:
            raise config.unknown_setting(f"model.{name}")
        # Of a group, other settings stay what the foreign model says.
        inside = isinstance(group[name], Mapping) and isinstance(value, Mapping)
        group[name] = {**group[name], **value} if inside else value
    length = settings["max_seq_len"]
    # What is no number is refused with the other settings.
    length = min(config.Data.seq_len, length) if type(length) is int else length
    return config.from_config_dict({"model": settings, "data": {"seq_len": length}})


@functools.lru_cache(maxsize=16)
def _parameter_shapes(model: config.Model) -> dict[Path, Shape]:
    return {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}


def _check_tensors(
    found: Mapping[str, ParameterSlice],
    shapes: Mapping[Path, Shape],
    given: Mapping[str, Shape],
    architecture: Architecture,
    model: config.Model,
) -> None:
    """Compares the tensors that are there with those that the model asks for.

    Args:
      found: the slices of the model's tensors.
      shapes: shapes of our parameters, by path.
      given: shapes of the foreign tensors, by name.
      architecture: of the foreign model.
      model: its settings.

    Raises:
      CheckpointError: a tensor is unknown, missing or of another shape.
    """
    wanted = {name: ours.layout.foreign_shape(ours.shape(shapes)) for name, ours in found.items()}
    idle = architecture.idle_tensors(model)
    for name in sorted(given.keys() - wanted.keys() - idle.keys()):
        if not any(re.fullmatch(pattern, name) for pattern in architecture.ignored):
            raise CheckpointError(f"tensor {named(name)} has no place in the model of config.json.")
    for name, shape in wanted.items():
        if name not in given:
            raise CheckpointError(f"tensor {name} is missing.")
        if given[name] != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(given[name])}, but config.json asks for "
                f"{list(shape)}."
            )
