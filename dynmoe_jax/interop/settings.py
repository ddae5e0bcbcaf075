"""Reading a foreign ``config.json``: what must be there, what may be left out, what is refused."""

from collections.abc import Iterable, Mapping
from typing import Any

from dynmoe_jax.interop.quoted import shown
from dynmoe_jax.runs.errors import CheckpointError

_CHANGE_EVERYTHING = ("quantization_config", "per_layer_config")
"""Settings of any architecture with which tensors, or layers, are others than read here."""

_LARGEST = 2**31 - 1
_SILU = ("silu", "swish")
_ROPE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


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
      defaults: values of what may be left out, or be null; a setting has the type of its default,
        and a whole number is read as a float where the default is one.
      fixed: what the architecture computes, whatever the configuration says.

    Raises:
      CheckpointError: a setting is missing, of another type, or differs from what is fixed.
    """
    for name in required:
        if name not in settings:
            raise CheckpointError(f"config.json lacks {name}.")
        check_count(name, settings[name])
    for name, value in (fixed or {}).items():
        _check_fixed(name, settings.get(name, value), value)
    for name in _CHANGE_EVERYTHING:
        if settings.get(name) not in (None, {}):
            raise CheckpointError(
                f"config.json has {name}={shown(settings[name])}, which is not read here; take the "
                "model without it."
            )
    found = dict(settings)
    for name, default in (defaults or {}).items():
        value = default if settings.get(name) is None else settings[name]
        if type(default) is int:
            check_count(name, value, least=min(default, 1))
        elif isinstance(default, float) and type(value) is int:
            value = _as_float(name, value)
        elif type(value) is not type(default):
            what = "true or false" if isinstance(default, bool) else "a number"
            raise CheckpointError(f"config.json has {name}={shown(value)}, which is not {what}.")
        found[name] = value
    return found


def _check_fixed(name: str, value: Any, computed: Any) -> None:
    if value == computed and isinstance(value, bool) == isinstance(computed, bool):
        return
    if name == "hidden_act" and value in _SILU:
        return
    if name == "model_type" and value is None:
        return
    raise CheckpointError(
        f"config.json asks for {name}={shown(value)}, but of this architecture {computed!r} alone "
        "is computed here."
    )


def rope_theta(settings: Mapping[str, Any], default: float = 10000.0) -> float:
    """Base of the rotary frequencies, as older (``rope_theta``) and newer files have it.

    Raises:
      CheckpointError: the positions are scaled, only a part of a head is rotated, or the base is no
        number.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance({} if settings.get(name) is None else settings[name], dict):
            raise CheckpointError(f"config.json has {name}={shown(settings[name])}, not an object.")
    # In this order, as transformers.
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    parts = [where.get("partial_rotary_factor") for where in (rope, settings)]
    if kind != "default" or any(p not in (None, 1) for p in parts) or not rope.keys() <= {*_ROPE}:
        raise CheckpointError(
            f"config.json asks for scaled rotary positions ({shown(rope)}), which are not computed "
            "here."
            if rope
            else f"config.json asks for partial_rotary_factor={shown(parts[1])}; whole heads alone "
            "are rotated here."
        )
    theta = rope.get("rope_theta", settings.get("rope_theta", default))
    if type(theta) not in (int, float):
        raise CheckpointError(f"config.json has rope_theta={shown(theta)}, which is not a number.")
    return _as_float("rope_theta", theta)


def check_window(name: str, window: Any, positions: int) -> None:
    """Raises CheckpointError for a sliding window that is shorter than what the model reads.

    A longer one changes nothing.

    Args:
      name: the setting.
      window: its value; null is none.
      positions: that the model is meant for.
    """
    if window is not None and (type(window) is not int or window < positions):
        raise CheckpointError(
            f"config.json asks for {name}={shown(window)}, less than its {positions} positions; "
            "attention to a window is not computed here."
        )


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises CheckpointError unless a setting is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise CheckpointError(f"config.json has {name}={shown(value)}, not a count.")
    if value > _LARGEST:
        raise CheckpointError(f"config.json has {name}={shown(value)}, more than {_LARGEST}.")


def check_alias(settings: Mapping[str, Any], name: str, alias: str) -> None:
    """Raises CheckpointError if a setting has another value under its other name."""
    if settings.get(alias, settings[name]) != settings[name]:
        raise CheckpointError(
            f"config.json has {name}={shown(settings[name])} and {alias}="
            f"{shown(settings[alias])}, which are names of one setting."
        )


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise CheckpointError(
            f"config.json has {name}={shown(value)}, which is too large."
        ) from None
