"""What has to be known of a foreign architecture."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.mapping import Rule


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A foreign architecture.

    Attributes:
      model_from_hf: its ``config.json`` as our settings; raises CheckpointError for what our
        model cannot be.
      rules: its tensors as slices of our parameters.
      ignored: regular expressions of names that carry nothing to load (buffers).
    """

    model_from_hf: Callable[[Mapping[str, Any]], config.Model]
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
