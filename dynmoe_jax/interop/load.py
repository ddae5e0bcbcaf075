"""A foreign model as a :class:`Decoder`."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.interop.architecture import Architecture
from dynmoe_jax.interop.errors import CheckpointError
from dynmoe_jax.interop.layouts import Shape
from dynmoe_jax.interop.mapping import Place, fill, places
from dynmoe_jax.interop.registry import architecture_of
from dynmoe_jax.interop.source import open_source
from dynmoe_jax.model import Decoder, parameter_shapes


def load_hf(path: str | os.PathLike, **overrides: Any) -> Decoder:
    """Loads a model in Hugging Face's format, or from a GGUF file.

    Args:
      path: a folder with ``config.json`` and ``model.safetensors``, or several safetensors files
        with ``model.safetensors.index.json``; or a ``.gguf`` file of a Llama.
      overrides: fields of :class:`config.Model` or of :class:`config.MoE` to set, such as
        ``backend="grouped"`` or ``dtype="bfloat16"``.

    Returns:
      the decoder, with float32 parameters.

    Raises:
      CheckpointError: the folder is incomplete, the architecture is not known, or a tensor is
        unknown, missing or of another shape than the configuration says.
      ConfigError: an override does not exist, or a setting is of the wrong type or out of range.
    """
    source = open_source(path)
    architecture = architecture_of(source.settings)
    model = with_overrides(architecture.model_from_hf(source.settings), overrides)
    shapes = {path: leaf.shape for path, leaf in parameter_shapes(model).flat_state()}
    found = places(architecture.rules, model, shapes)
    check_tensors(found, shapes, source.shapes(), architecture, model)
    parameters = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    fill(found, source.tensors(found), parameters)
    return _decoder(model, parameters)


def with_overrides(model: config.Model, overrides: Mapping[str, Any]) -> config.Model:
    """The model with some settings changed, all of them checked.

    Raises:
      ConfigError: a name does not exist, or a value has the wrong type or is out of range.
    """
    settings = config.to_dict(model)
    for name, value in overrides.items():
        group = settings if name in settings else settings["moe"]
        if name not in group:
            raise config.unknown_setting(f"model.{name}")
        group[name] = value
    return _config_of(settings).model


def checked_config(model: config.Model) -> config.Config:
    """A run of the model; everything else is as by default, if the model allows it.

    Raises:
      ConfigError: a setting has the wrong type, is out of range, or contradicts another.
    """
    return _config_of(config.to_dict(model))


def _config_of(model: Mapping[str, Any]) -> config.Config:
    length = model["max_seq_len"]
    # What is no number is refused with the other settings.
    length = min(config.Data.seq_len, length) if type(length) is int else length
    return config.from_config_dict({"model": model, "data": {"seq_len": length}})


def check_tensors(
    found: Mapping[str, Place],
    shapes: Mapping[tuple, Shape],
    given: Mapping[str, Shape],
    architecture: Architecture,
    model: config.Model,
) -> None:
    """Compares the tensors that are there with those that the model asks for.

    Args:
      found: the places of the model's tensors.
      shapes: shapes of our parameters, by path.
      given: shapes of the foreign tensors, by name.
      architecture: of the foreign model.
      model: its settings.

    Raises:
      CheckpointError: a tensor is unknown, missing or of another shape.
    """
    wanted = {
        name: place.layout.foreign_shape(place.shape(shapes)) for name, place in found.items()
    }
    idle = architecture.idle_tensors(model)
    for name in sorted(given.keys() - wanted.keys() - idle.keys()):
        if not any(re.fullmatch(pattern, name) for pattern in architecture.ignored):
            raise CheckpointError(f"tensor {name} has no place in the model of config.json.")
    for name, shape in wanted.items():
        if name not in given:
            raise CheckpointError(f"tensor {name} is missing.")
        if given[name] != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(given[name])}, but config.json asks for "
                f"{list(shape)}."
            )


def _decoder(model: config.Model, parameters: dict[tuple, np.ndarray]) -> Decoder:
    """A decoder around given parameters; none are drawn first."""
    structure, state = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    # Popped, so that no more than one parameter exists twice.
    leaves = [(p, leaf.replace(jnp.asarray(parameters.pop(p)))) for p, leaf in state.flat_state()]
    return nnx.merge(structure, nnx.from_flat_state(leaves))
