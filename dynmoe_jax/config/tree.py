"""Tree of all settings, with a group for every registered kind, and its ways in and out.

A config file (``configs/*.py``) starts from ``config.Config()``, changes fields with
:func:`dataclasses.replace`, and returns :func:`to_config_dict` of it, so that any setting can be
overridden on the command line (``--config.model.num_layers=8``).  :func:`from_config_dict` turns
the edited dictionary back into a checked ``Config``; everything else in the package reads the
frozen dataclass.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import ml_collections

from dynmoe_jax import fields
from dynmoe_jax.config import model, settings
from dynmoe_jax.fields import ConfigError, walk
from dynmoe_jax.registry import complete, names_in


def current(name: str) -> type:
    """The class of a group of settings, with all kinds that are registered by now."""
    where = model if name in ("MoE", "Model") else settings
    return complete(getattr(where, name))


def nearest_name(name: str) -> str:
    """The existing setting, or group of settings, whose dotted path is most like ``name``."""
    return fields.nearest_name(current("Config"), name)


def unknown_setting(name: str) -> ConfigError:
    """The error for a setting that does not exist, or not any more."""
    return fields.unknown_setting(current("Config"), name)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as nested plain dictionaries (JSON-able)."""
    found = dataclasses.asdict(config)
    for path, text in found.pop("kept", ()):
        *groups, name = path.split(".")
        _inside(found, groups)[name] = json.loads(text)
    return found


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Returns what a config file returns: the settings, open to overrides from the command line."""
    return ml_collections.ConfigDict(to_dict(config))


def from_config_dict(settings: Mapping[str, Any]) -> Any:
    """Builds the checked Config from nested dictionaries.

    Raises:
      ConfigError: a name does not exist, or a value has the wrong type or is out of range.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return fields.build(current("Config"), settings)


def from_stored(settings: Mapping[str, Any]) -> Any:
    """Builds the Config of a stored run.

    Settings that have another name by now are moved, those without effect are at their defaults;
    groups of kinds that nobody has imported are kept as they are.

    Raises:
      ConfigError: as from :func:`from_config_dict`; such as a router that is not imported.
    """
    settings = json.loads(json.dumps(settings))  # a copy
    _move(settings)
    _forget_idle(current("Config"), settings)
    return _with_kept(settings)


def _with_kept(settings: dict[str, Any]) -> Any:
    """Builds the Config; groups that it does not know are taken out of ``settings``, and kept."""
    kept = tuple(_taken_out(current("Config"), settings, ""))
    return dataclasses.replace(fields.build(current("Config"), settings), kept=kept)


def with_free_settings(config: Any, changes: Mapping[str, str]) -> Any:
    """The Config of a stored run with other values of what is no part of its model.

    Such are choices of how it is computed, and what a router may choose at inference.

    Args:
      config: of the run.
      changes: values, as people write them, by dotted path.

    Raises:
      ConfigError: a setting does not exist, is part of the model or has nothing to do with it, or
        its value cannot be.
    """
    declared = {path: field for path, field, _ in walk(config)}
    settings = to_dict(config)
    _forget_unnamed(settings, declared, changes)
    for path, text in changes.items():
        if path not in declared:
            raise unknown_setting(path)
        field = declared[path]
        if not path.startswith("model.") or field.metadata["defines_model"]:
            why = "is part of the model" if field.metadata["defines_model"] else "is of training"
            raise ConfigError(
                f"config.{path}={text} cannot be said of a run that is stored, because it {why}; "
                "leave it out, or train a run with it."
            )
        *groups, name = path.split(".")
        _inside(settings, groups)[name] = fields.from_text(field, text)
    return _with_kept(settings) if changes else config


def _forget_unnamed(settings: dict[str, Any], declared: Any, changes: Mapping[str, str]) -> None:
    """Takes out the settings of kinds that a changed choice does not name any more."""
    for path, text in changes.items():
        if path in declared and "registry" in declared[path].metadata:
            *groups, name = path.split(".")
            group = _inside(settings, groups)
            for kind in set(names_in(group[name])) - set(names_in(text)):
                group.pop(kind, None)


def kept_groups(config: Any) -> dict[str, dict[str, Any]]:
    """Stored groups of kinds that nobody has imported, by dotted path."""
    return {path: json.loads(text) for path, text in config.kept}


def _move(settings: dict[str, Any]) -> None:
    """Gives settings the names that they have now."""
    values = {old: _taken(settings, old) for old in _former_names()}
    for path, field, default in walk(current("Config")()):
        for old in field.metadata["formerly"]:
            if values[old] is not None:
                _put(settings, path, values[old], default)


def _forget_idle(kind: type, settings: dict[str, Any]) -> None:
    """Takes out values of settings that others leave without effect, which runs of before hold."""
    declared = {field.name: field for field in dataclasses.fields(kind)}
    defaults = {name: field.default for name, field in declared.items()}
    for name in fields.idle_settings(kind, defaults | settings):
        settings.pop(name, None)
    for name, value in settings.items():
        inner = declared[name].type if name in declared else None
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            _forget_idle(inner, value)


def _former_names() -> set[str]:
    declared = (field.metadata["formerly"] for _, field, _ in walk(current("Config")()))
    return {old for names in declared for old in names}


def _taken(settings: dict[str, Any], path: str) -> Any:
    """Removes and returns a stored value; None if there is none."""
    *groups, name = path.split(".")
    inner = settings
    for group in groups:
        inner = inner.get(group) or {}
    return None if isinstance(inner.get(name), Mapping) else inner.pop(name, None)


def _put(settings: dict[str, Any], path: str, value: Any, default: Any) -> None:
    """Stores a moved value, unless it is of a kind that the run does not use."""
    *groups, name = path.split(".")
    parent = _inside(settings, groups[:-1])
    for field in dataclasses.fields(_class_at(groups[:-1])):
        registry = field.metadata.get("registry")
        if groups[-1] not in (registry or ()) or not dataclasses.fields(registry[groups[-1]]):
            continue
        names = names_in(parent.get(field.name, field.default))
        if groups[-1] in names:
            continue
        if not field.metadata["many"] or not value:  # 0 was "off"
            return
        parent[field.name] = ",".join([*names, groups[-1]])
    parent.setdefault(groups[-1], {})[name] = value


def _class_at(groups: list[str]) -> type:
    found = current("Config")
    for group in groups:
        found = next(field.type for field in dataclasses.fields(found) if field.name == group)
    return found


def _inside(settings: dict[str, Any], groups: list[str]) -> dict[str, Any]:
    for group in groups:
        settings = settings.setdefault(group, {})
    return settings


def _taken_out(kind: type, settings: dict[str, Any], prefix: str):
    """Removes and yields (path, JSON) of groups that the class of settings does not have."""
    fields_ = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in list(settings.items()):
        if not isinstance(value, dict):
            continue
        if name not in fields_:
            yield f"{prefix}{name}", json.dumps(settings.pop(name))
        elif dataclasses.is_dataclass(fields_[name].type):
            yield from _taken_out(fields_[name].type, value, f"{prefix}{name}.")


def differences(config: Any) -> list[tuple[str, Any, Any]]:
    """(dotted path, value, default) of every setting that differs from its default."""
    defaults = {path: value for path, _, value in walk(current("Config")())}
    return [
        (path, fields.shown(field, value), fields.shown(field, defaults[path]))
        for path, field, value in walk(config)
        if value != defaults[path]
    ]
