"""Settings of a run: the tree with all defaults, and the checks between settings."""

from dynmoe_jax.config.model import Model, MoE
from dynmoe_jax.config.settings import (
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Logging,
    Loss,
    Mesh,
    Optimizer,
    Train,
    differences,
    from_config_dict,
    nearest_name,
    to_config_dict,
    to_dict,
    unknown_setting,
)
from dynmoe_jax.fields import ConfigError, walk

__all__ = [
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
    "differences",
    "from_config_dict",
    "nearest_name",
    "to_config_dict",
    "to_dict",
    "unknown_setting",
    "walk",
]
