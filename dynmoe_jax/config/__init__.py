"""Settings of a run: the tree with all defaults, and the checks between settings.

``Config``, ``Model``, ``MoE``, ``Loss``, ``Data`` and ``Train`` are made when they are asked for,
with a group of settings for every kind that is registered by then.
"""

from typing import Any

from dynmoe_jax.config.growth import growth_steps, growths, model_at, settings_at
from dynmoe_jax.config.rules import check_begun
from dynmoe_jax.config.settings import Checkpoint, Evaluation, Logging, Mesh, Optimizer
from dynmoe_jax.config.tree import (
    current,
    differences,
    from_config_dict,
    from_stored,
    kept_groups,
    nearest_name,
    to_config_dict,
    to_dict,
    unknown_setting,
    with_free_settings,
)
from dynmoe_jax.fields import AUTO, ConfigError, shown, walk

_MADE = ("Config", "Data", "Loss", "MoE", "Model", "Train")

__all__ = [
    "AUTO",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Data",
    "Evaluation",
    "Logging",
    "Loss",
    "Mesh",
    "MoE",
    "Model",
    "Optimizer",
    "Train",
    "check_begun",
    "differences",
    "from_config_dict",
    "from_stored",
    "growth_steps",
    "growths",
    "kept_groups",
    "model_at",
    "nearest_name",
    "settings_at",
    "shown",
    "to_config_dict",
    "to_dict",
    "unknown_setting",
    "walk",
    "with_free_settings",
]


def __getattr__(name: str) -> Any:
    if name in _MADE:
        return current(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
