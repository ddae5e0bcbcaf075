"""Declaration of settings, and how they are found, checked and built; knows none of them by name.

The settings themselves are in :mod:`dynmoe_jax.config`, what they ask of each other in
:mod:`dynmoe_jax.config.rules`.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

# Of float32: the smallest normal number, and the largest.
_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
_LARGEST_INT = 2**31 - 1
AUTO = -1.0
"""Value of a number that is left to somebody else, where its declaration says ``auto``; people
write and read ``auto``."""


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another.

    The message is one sentence that names the setting, its value and the remedy.
    """


def setting(
    default: Any,
    help: str,
    *,
    defines_model: bool,
    fixed_in_run: bool,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Collection[str] = (),
    auto: bool = False,
    per_layer: bool = False,
    formerly: tuple[str, ...] = (),
    only_with: Mapping[str, Collection[Any]] | None = None,
) -> Any:
    """Declares one setting of a config dataclass.

    Args:
      default: its value unless a config file or the command line says otherwise.
      help: one line for people.
      defines_model: the setting is part of what the model computes: a run that begins with the
        model of another one takes it over, and export writes it down or refuses it.
      fixed_in_run: a run that was begun with one value cannot be continued with another.
      unit: what the number counts, e.g. ``"tokens"``.
      low: smallest value allowed.
      high: largest value allowed.
      above: the value must be strictly greater than this.
      choices: the strings allowed, if only some are.
      auto: :data:`AUTO` is allowed besides.
      per_layer: ``config.model.layers`` may give some layers a value of their own.
      formerly: dotted paths that the setting had before, as in ``"loss.balance_weight"``.
      only_with: other settings of the group, and values of each with which this one has an effect;
        an empty collection: with any but 0 and False.  They may not be ``per_layer``.
    """
    rules = {"low": low, "high": high, "above": above, "choices": choices, "auto": auto}
    rules |= {"defines_model": defines_model, "fixed_in_run": fixed_in_run}
    rules |= {"per_layer": per_layer, "formerly": formerly, "only_with": dict(only_with or {})}
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, **rules})


model_setting = functools.partial(setting, defines_model=True, fixed_in_run=True)
"""Declares a setting of the function that a model computes, or of its parameters."""

run_setting = functools.partial(setting, defines_model=False, fixed_in_run=True)
"""Declares a setting that a run keeps from its first step to its last, such as its batches."""

free_setting = functools.partial(setting, defines_model=False, fixed_in_run=False)
"""Declares a setting that may change whenever a run is continued."""


def same_setting(group: type, name: str) -> Any:
    """Declares a setting as another group of settings does, such as an operation that of a router
    that it makes.

    Args:
      group: the dataclass of the other group.
      name: of the setting.
    """
    declared = next(field for field in dataclasses.fields(group) if field.name == name)
    return dataclasses.field(default=declared.default, metadata=declared.metadata)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields (dotted path, field, value) of every leaf setting, in declaration order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            yield prefix + field.name, field, value


def idle_settings(kind: type, values: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a group that have no effect, each with the other one that is the reason.

    Args:
      kind: the dataclass of the group.
      values: of all its settings, by name.
    """
    needs = {f.name: f.metadata.get("only_with", {}) for f in dataclasses.fields(kind)}

    def reason(name: str) -> str:
        for other, wanted in needs[name].items():
            if not (values[other] in wanted if wanted else values[other]):
                return other
            if further := reason(other):
                return further
        return ""

    return {name: found for name in needs if (found := reason(name))}


def without_idle(group: Any) -> Any:
    """The same settings, with the defaults of those that have no effect."""
    idle = idle_settings(type(group), vars(group))
    defaults = {f.name: f.default for f in dataclasses.fields(group) if f.name in idle}
    return dataclasses.replace(group, **defaults)


def shown(field: dataclasses.Field, value: Any) -> Any:
    """A value as people read it."""
    return "auto" if field.metadata["auto"] and value == AUTO else value


def from_text(field: dataclasses.Field, text: str) -> Any:
    """The text as a value of the setting's type; the text itself if it is none."""
    if field.metadata["auto"] and text == "auto":
        return AUTO
    if field.type is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return field.type(text)
    except ValueError:
        return text


def nearest(name: str, names: Iterable[str]) -> str:
    """The name among several that is most like another one."""
    return difflib.get_close_matches(name, list(names), 1, 0.0)[0]


def nearest_name(kind: type, name: str) -> str:
    """The existing setting, or group of settings, whose dotted path is most like ``name``.

    Args:
      kind: the dataclass of all settings.
      name: what somebody wrote.
    """
    names = [path for path, _, _ in walk(kind())]
    names += dict.fromkeys(path[:dot] for path in names for dot, c in enumerate(path) if c == ".")
    last = name.rsplit(".", 1)[-1]
    leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(names)}
    by_whole = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if last in leaves or by_whole:
        return leaves.get(last) or by_whole[0]
    by_leaf = difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)
    return leaves[by_leaf[0]] if by_leaf else difflib.get_close_matches(name, names, 1, 0.0)[0]


def moved_to(kind: type, name: str) -> list[str]:
    """The settings that ``name`` was before, if it ever was one."""
    return [path for path, field, _ in walk(kind()) if name in field.metadata["formerly"]]


def unknown_setting(kind: type, name: str) -> ConfigError:
    """The error for a setting that does not exist, or not any more."""
    if now := moved_to(kind, name):
        paths = " or ".join(f"config.{path}" for path in now)
        return ConfigError(f"config.{name} is called {paths} now.")
    # As repr shows it: a name with a line break in it must not break the sentence.
    name = repr(name)[1:-1]
    near = nearest_name(kind, name)
    return ConfigError(f"config.{name} does not exist; did you mean config.{near}?")


def check_value(
    path: str, field: dataclasses.Field, value: Any, *, prefix: str = "config."
) -> None:
    """Raises ConfigError unless ``value`` has the field's type and lies in its range.

    Args:
      path: the setting's name.
      field: its declaration.
      value: its value.
      prefix: what stands before the name where people write it.
    """
    rule, where = field.metadata, f"{prefix}{path}={value!r}"
    wanted = field.type
    if rule["auto"] and value == AUTO:
        return
    good = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    if not good:
        raise ConfigError(f"{where} must be of type {wanted.__name__}: {rule['help']}.")
    _check_choice(where, rule, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number: {rule['help']}.")
    unit = f" {rule['unit']}" if rule["unit"] else ""
    if rule["above"] is not None and not value > rule["above"]:
        raise ConfigError(f"{where} must be greater than {rule['above']:g}{unit}.")
    if rule["low"] is not None and value < rule["low"]:
        or_auto = ", or auto" if rule["auto"] else ""
        raise ConfigError(f"{where} must be at least {rule['low']:g}{unit}{or_auto}.")
    if rule["high"] is not None and value > rule["high"]:
        raise ConfigError(f"{where} must be at most {rule['high']:g}{unit}.")
    _check_storable(where, value)


def _check_choice(where: str, rule: Mapping[str, Any], value: Any) -> None:
    """Raises ConfigError for a name that is not among the choices, or where many are, for one."""
    # A registry is empty until its room is imported.
    if not rule["choices"] or (rule.get("optional") and not value):
        return
    many = rule.get("many", False)
    given = [name.strip() for name in value.split(",") if name.strip()] if many else [value]
    for name in given:
        if name not in rule["choices"]:
            near = difflib.get_close_matches(name, rule["choices"], n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            if "registry" in rule:
                hint = f", or of a file that --plugin names{hint}"
            what = "name some of" if many else "be one of"
            raise ConfigError(f"{where} must {what} {', '.join(rule['choices'])}{hint}")
    if len(set(given)) < len(given):
        raise ConfigError(f"{where} must name each at most once.")


def _check_storable(where: str, value: Any) -> None:
    """Raises ConfigError for a value that would turn into another one on its way.

    Numbers end in 32-bit arithmetic, where 1e-300 is 0 and 1e300 infinite; strings in file names
    and JSON.
    """
    if isinstance(value, float) and value and not _SMALLEST <= abs(value) <= _LARGEST:
        raise ConfigError(
            f"{where} is no number in float32; use 0 or one between {_SMALLEST:g} and {_LARGEST:g}."
        )
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        raise ConfigError(f"{where} must be at most {_LARGEST_INT}, which 32 bits hold.")
    if isinstance(value, str) and ("\0" in value or not _encodable(value)):
        raise ConfigError(f"{where} holds a NUL or a lone surrogate; leave it out.")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def build(kind: type, settings: Mapping[str, Any]) -> Any:
    """The checked dataclass of nested dictionaries; what is not in them is as by default.

    Raises:
      ConfigError: a name does not exist, or a value has the wrong type or is out of range.
    """
    return _build(kind, settings, kind, "")


def _build(kind: type, settings: Mapping[str, Any], whole: type, prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind) if _is_setting(f)}
    values = {}
    for name, value in settings.items():
        if name not in fields:
            raise unknown_setting(whole, f"{prefix}{name}")
        wanted = fields[name].type
        if dataclasses.is_dataclass(wanted):
            if not isinstance(value, Mapping):
                if moved_to(whole, f"{prefix}{name}"):
                    raise unknown_setting(whole, f"{prefix}{name}")
                raise ConfigError(f"config.{prefix}{name}={value!r} must be a group of settings.")
            value = _build(wanted, value, whole, f"{prefix}{name}.")
        elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # refused as what it is
                value = float(value)
        values[name] = value
    return kind(**values)


def _is_setting(field: dataclasses.Field) -> bool:
    """Whether a field is a setting or a group of them."""
    return dataclasses.is_dataclass(field.type) or "help" in field.metadata
