"""Reading a foreign ``config.json``: what must be there, what may be left out, what is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from dynmoe_jax.interop.errors import CheckpointError


def read_settings(
    settings: Mapping[str, Any],
    *,
    required: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings, checked and completed.

    Args:
      settings: what ``config.json`` holds.
      required: names of counts that must be there.
      defaults: values of what may be left out, or be null; a whole number is read as a float
        where the default is one.
      fixed: what the architecture computes, whatever the configuration says.

    Raises:
      CheckpointError: a setting is missing, is no count, or differs from what is fixed.
    """
    for name in required:
        if name not in settings:
            raise CheckpointError(f"config.json lacks {name}.")
        _check_count(name, settings[name])
    for name, value in (fixed or {}).items():
        if settings.get(name, value) != value:
            raise CheckpointError(
                f"config.json asks for {name}={settings[name]!r}, but of this architecture "
                f"{value!r} alone is computed here."
            )
    found = dict(settings)
    for name, default in (defaults or {}).items():
        value = default if settings.get(name) is None else settings[name]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        elif type(default) is int:
            _check_count(name, value, least=min(default, 1))
        found[name] = value
    return found


def rope_theta(settings: Mapping[str, Any], default: float = 10000.0) -> float:
    """Base of the rotary frequencies, as older (``rope_theta``) and newer files have it.

    Raises:
      CheckpointError: the positions are scaled, or only a part of a head is rotated.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(
            f"config.json asks for scaled rotary positions ({rope!r}), which are not computed here."
        )
    theta = rope.get("rope_theta", settings.get("rope_theta"))
    return float(default if theta is None else theta)


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise CheckpointError(f"config.json has {name}={value!r}, not a count.")
