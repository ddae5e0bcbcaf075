"""A foreign model as a :class:`Decoder`."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.mapping import fill
from dynmoe_jax.interop.described import describe
from dynmoe_jax.interop.files.source import open_source
from dynmoe_jax.model import Decoder


def load_hf(path: str | os.PathLike, **overrides: Any) -> Decoder:
    """Loads a model in Hugging Face's format, or from a GGUF file.

    Args:
      path: a folder with ``config.json`` and ``model.safetensors``, or several safetensors files
        with ``model.safetensors.index.json``; or a ``.gguf`` file of a Llama.
      overrides: fields of :class:`config.Model` or of :class:`config.MoE` to set, such as
        ``backend="grouped"``, ``dtype="bfloat16"`` or ``top_p={"threshold": 0.3}``.

    Returns:
      the decoder, with float32 parameters.

    Raises:
      CheckpointError: the folder is incomplete, the architecture is not known, or a tensor is
        unknown, missing or of another shape than the configuration says.
      ConfigError: an override does not exist, or a setting is of the wrong type or out of range.
    """
    described = describe(open_source(path), overrides)
    parameters = {path: np.empty(shape, np.float32) for path, shape in described.shapes.items()}
    fill(described.found, described.source.tensors(described.found), parameters)
    return _decoder(described.config.model, parameters)


def _decoder(model: config.Model, parameters: dict[tuple, np.ndarray]) -> Decoder:
    """A decoder around given parameters; none are drawn first."""
    structure, state = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    # Popped, so that no more than one parameter exists twice.
    leaves = [(p, leaf.replace(jnp.asarray(parameters.pop(p)))) for p, leaf in state.flat_state()]
    return nnx.merge(structure, nnx.from_flat_state(leaves))
