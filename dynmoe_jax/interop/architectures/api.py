"""Description of a foreign architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.layouts import Shape
from dynmoe_jax.interop.architectures.mapping import Rule


def no_idle_tensors(model: config.Model) -> dict[str, Shape]:
    """Most architectures have none."""
    return {}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A foreign architecture.

    Attributes:
      name: what ``config.json`` gives under ``architectures``.
      model_from_hf: its ``config.json`` as our settings; raises CheckpointError for what our
        model cannot be.
      model_to_hf: our settings as its ``config.json``, without the names of the architecture.  Of
        a model that the architecture cannot be, ``model_from_hf`` of it gives another one.
      rules: its tensors as slices of our parameters.
      ignored: regular expressions of names that carry nothing to load (buffers).
      idle_tensors: names and shapes of tensors that it has, but that add nothing to the output of
        a given model: written as zeros, not read.
      code: names of files of this package that travel with an exported model.
    """

    name: str
    model_from_hf: Callable[[Mapping[str, Any]], config.Model]
    model_to_hf: Callable[[config.Model], dict[str, Any]]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    idle_tensors: Callable[[config.Model], dict[str, Shape]] = no_idle_tensors
    code: tuple[str, ...] = ()
