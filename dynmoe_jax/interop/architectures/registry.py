"""Registry of foreign architectures."""

from collections.abc import Mapping
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.architectures.api import Architecture
from dynmoe_jax.interop.architectures.deepseek import DEEPSEEK
from dynmoe_jax.interop.architectures.dynamic_moe import DYNAMIC_MOE
from dynmoe_jax.interop.architectures.llama import LLAMA
from dynmoe_jax.interop.architectures.mixtral import MIXTRAL
from dynmoe_jax.interop.architectures.moe_layers import moe_layers
from dynmoe_jax.interop.architectures.olmoe import OLMOE
from dynmoe_jax.interop.architectures.qwen2_moe import QWEN2_MOE
from dynmoe_jax.registry import idle_kinds
from dynmoe_jax.runs.errors import CheckpointError

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (LLAMA, MIXTRAL, OLMOE, QWEN2_MOE, DEEPSEEK, DYNAMIC_MOE)
}
"""By the name that ``config.json`` gives; a model is exported as the first one that fits."""


def architecture_of(settings: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` names.

    Raises:
      CheckpointError: it is not known.
    """
    names = settings.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(
            f"config.json names the architecture {names[0]!r}; known are: "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[names[0]]


def architecture_for(model: config.Model) -> Architecture:
    """The first architecture whose ``config.json`` says all that a model computes.

    Raises:
      CheckpointError: none does.
    """
    if model.mask_steps:
        raise CheckpointError(
            "no format of Hugging Face's has such a model, which has grown and whose masks "
            f"(config.model.mask_steps={model.mask_steps}) are below 1; train it on until they "
            "are 1."
        )
    if model.layers:
        raise CheckpointError(
            "no format of Hugging Face's has such a model, whose layers differ by "
            f"config.model.layers={model.layers!r}; export one whose layers are equal."
        )
    differing: dict[str, list[str]] = {}
    for name, architecture in ARCHITECTURES.items():
        try:
            back = what_is_computed(architecture.model_from_hf(architecture.model_to_hf(model)))
        except CheckpointError:
            continue
        wanted = what_is_computed(model)
        differing[name] = [key for key, value in wanted.items() if back.get(key) != value]
        if not differing[name]:
            return architecture
    nearest, settings = min(differing.items(), key=lambda item: len(item[1]))
    raise CheckpointError(
        f"no format of Hugging Face's has such a model; {nearest} comes nearest, without "
        f"{', '.join(f'config.model.{setting}' for setting in settings)}."
    )


def what_is_computed(model: config.Model) -> dict[str, Any]:
    """The settings that define a model, by name, without those that have no effect in it."""
    settings = {
        path: value
        for path, field, value in config.walk(model)
        if field.metadata["defines_model"] and not _has_no_effect(path, model)
    }
    # Which layers have experts has three settings, and more than one way to say it.
    settings["moe.every_n_layers"] = moe_layers(model)
    return settings


def _has_no_effect(path: str, model: config.Model) -> bool:
    """Whether a setting does nothing in a model because of what others say."""
    if path in ("moe.layer_offset", "moe.dense_first_layers"):
        return True
    if path in ("hidden_width", "activation") or path.startswith(f"{model.activation}."):
        return len(moe_layers(model)) == model.num_layers
    if any(path.startswith(f"moe.{name}.") for _, name, _ in idle_kinds(model.moe)):
        return True
    if any(path.startswith(f"{name}.") for _, name, _ in idle_kinds(model)):
        return True
    return path.startswith("moe.") and not moe_layers(model)
