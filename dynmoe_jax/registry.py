"""Registries of kinds by name, and trees of settings with a group for every kind.

A kind (a router, a loss, a transform, …) is a frozen dataclass whose fields are its settings.  The
line that registers it is all that makes it known: a group of settings under its name, its help, its
checks and the choice itself follow from the registry.  Trees are made when they are asked for, so
that they hold what a plug-in or a test has registered by then.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ml_collections import ConfigDict

from dynmoe_jax.fields import ConfigError, nearest, setting


class Registry(Mapping[str, type]):
    """Kinds of one family by name, in the order in which they were registered.

    Args:
      family: what one of them is called, such as ``"router"``.
    """

    def __init__(self, family: str):
        self.family = family
        self._kinds: dict[str, type] = {}

    def __repr__(self) -> str:
        return f"Registry({self.family!r}: {', '.join(self)})"

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __getitem__(self, name: str) -> type:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def register(self, name: str):
        """Registers the dataclass below it as a kind called ``name``.

        Raises:
          ValueError: the name is no identifier or taken, the kind is no frozen dataclass, or a
            setting of it could not be told from a method of ConfigDict.
        """

        def registered(kind: type) -> type:
            frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
            if not name.isidentifier() or not frozen:
                raise ValueError(f"{self.family} {name!r} must be a frozen dataclass with a name.")
            if inspect.isabstract(kind):
                missing = ", ".join(sorted(kind.__abstractmethods__))
                raise ValueError(f"{self.family} {name!r} has to define {missing}.")
            if name in self._kinds:
                raise ValueError(f"{self.family} {name!r} is registered already.")
            for field in dataclasses.fields(kind):
                if hasattr(ConfigDict, field.name):
                    raise ValueError(
                        f"{self.family} {name!r} has a setting {field.name!r}, which is a method "
                        "of ConfigDict; rename it."
                    )
            self._kinds[name] = kind
            return kind

        return registered

    @contextlib.contextmanager
    def temporarily(self, name: str, kind: type) -> Iterator[type]:
        """Registers a kind within a ``with`` block."""
        self.register(name)(kind)
        try:
            yield kind
        finally:
            del self._kinds[name]


ROUTERS = Registry("router")
LOSSES = Registry("routing loss")
CONTROLLERS = Registry("controller")
TRANSFORMS = Registry("transform")
REGULARIZERS = Registry("regularizer")
EXPERTS = Registry("kind of expert")
LINEARS = Registry("kind of linear map")
OBJECTIVES = Registry("objective")
CORRUPTIONS = Registry("corruption of text")
REWEIGHTINGS = Registry("rule of domain weights")
"""Registries that settings choose from.  The rooms that hold the kinds fill them when they are
imported; until then they are empty, and what a setting names is not checked."""


def choice(
    registry: Registry,
    default: str,
    help: str,
    *,
    many: bool = False,
    optional: bool = False,
    **facts: Any,
) -> Any:
    """Declares a setting that names a kind of a registry; kinds' groups stand beside it.

    Args:
      registry: of the kinds.
      default: name of the kind; where ``many``, names with commas between them, or none.
      help: one line for people.
      many: several kinds may be named, or none.
      optional: none may be named.
      facts: as of :func:`dynmoe_jax.fields.setting`.
    """
    declared = setting(default, help, choices=registry, **facts)
    more = {"registry": registry, "many": many, "optional": optional}
    return dataclasses.field(default=default, metadata={**declared.metadata, **more})


def chosen(group: Any, name: str) -> Any:
    """The kind that a setting declared by :func:`choice` names, with its settings.

    Args:
      group: settings with that choice among them.
      name: of the choice.

    Returns:
      an instance of the kind, or None if none is named; where the choice is of many, a tuple of
      them, in order.
    """
    field = next(field for field in dataclasses.fields(group) if field.name == name)
    registry = field.metadata["registry"]
    kinds = tuple(
        _settings_of(group, registry, each) or registry[each]()
        for each in names_in(getattr(group, name))
    )
    return kinds if field.metadata["many"] else (kinds[0] if kinds else None)


def _settings_of(group: Any, registry: Mapping[str, type], name: str) -> Any:
    """The settings of a kind in a group; None of a kind that has none, though another registry's
    kind of that name may have some."""
    found = getattr(group, name, None)
    return found if isinstance(found, registry.get(name, object)) else None


def names_in(text: str) -> list[str]:
    """The names in a comma-separated setting."""
    return [name.strip() for name in text.split(",") if name.strip()]


def all_kinds(group: Any) -> dict[str, Any]:
    """Every kind of the registry in the ``kinds`` of a group, with its settings, by name."""
    return {name: getattr(group, name, None) or kind() for name, kind in group.kinds.items()}


def idle_kinds(group: Any) -> Iterator[tuple[str, str, Any]]:
    """Yields (choice, name, settings) of the kinds in a group that their choice does not name."""
    for field in dataclasses.fields(group):
        registry = field.metadata.get("registry")
        for name in registry or ():
            settings = _settings_of(group, registry, name)
            if settings is not None and name not in names_in(getattr(group, field.name)):
                yield field.name, name, settings


def with_choice(group: Any, name: str, kinds: Collection[str]) -> Any:
    """A group of settings in which a choice names other kinds.

    Settings of kinds that it names no more are at their defaults, as they have to be.

    Args:
      group: settings with that choice among them.
      name: of the choice.
      kinds: what it is to name, in order.
    """
    field = next(field for field in dataclasses.fields(group) if field.name == name)
    registry = field.metadata["registry"]
    found = {kind: _settings_of(group, registry, kind) for kind in registry if kind not in kinds}
    defaults = {kind: type(idle)() for kind, idle in found.items() if idle is not None}
    return dataclasses.replace(group, **{name: ",".join(kinds)}, **defaults)


# ── Trees ────────────────────────────────────────────────────────────────────────────────────────

_complete: dict[tuple, type] = {}


def complete(base: type) -> type:
    """The dataclass ``base`` with a group of settings for every kind that it chooses from.

    A choice declared by :func:`choice` brings the kinds of its registry; a class variable ``kinds``
    those of a registry that are all there at once.  Groups inside of groups are completed alike.
    The same kinds give the same class.  Kinds of two registries may have one name, unless both
    have settings.

    Raises:
      ConfigError: a kind has the name of a setting, or of another kind's group of settings.
    """
    owners: dict[str, Any] = {field.name: base for field in dataclasses.fields(base)}
    groups = {
        field.name: complete(field.type)
        for field in dataclasses.fields(base)
        if dataclasses.is_dataclass(field.type)
    }
    registries = [field.metadata.get("registry") for field in dataclasses.fields(base)]
    for registry in (*registries, getattr(base, "kinds", None)):
        for name, kind in (registry or {}).items():
            has_settings = bool(dataclasses.fields(kind))
            owner = owners.setdefault(name, registry) if has_settings else owners.get(name)
            if owner is base or (has_settings and owner is not registry):
                raise ConfigError(
                    f"{registry.family} {name!r} has the name of another setting of "
                    f"{base.__name__}; rename it."
                )
            if has_settings:
                groups[name] = complete(kind)
    if not groups:
        return base
    key = (base, *groups.items())
    if key not in _complete:
        _complete[key] = _made(base, groups)
    return _complete[key]


def _made(base: type, groups: Mapping[str, type]) -> type:
    fields = [
        (name, kind, dataclasses.field(default_factory=kind)) for name, kind in groups.items()
    ]
    made = dataclasses.make_dataclass(base.__name__, fields, bases=(base,), frozen=True)
    made.__doc__, made.__module__ = base.__doc__, base.__module__
    made.base: ClassVar = base
    plain = made.__init__

    def __init__(self, *args, **kwargs):
        """Builds the settings; a mapping stands for the group of its settings."""
        names = [field.name for field in dataclasses.fields(made)]
        for name, value in kwargs.items():
            if name not in names:
                raise _unknown_argument(made, name, value)
            if name in groups and isinstance(value, Mapping):
                kwargs[name] = groups[name](**value)
            elif name in groups and not dataclasses.is_dataclass(value):
                raise _unknown_argument(made, name, value)
        plain(self, *args, **kwargs)

    made.__init__ = __init__
    return made


def _unknown_argument(kind: type, name: str, value: Any) -> ConfigError:
    """The error for a setting that a group does not have, in a config file."""
    where = f"{kind.__name__}({name}={value!r})"
    later = [
        path
        for path, metadata in declared(kind)
        if any(old.rsplit(".", 1)[-1] == name for old in metadata["formerly"])
    ]
    if later:
        return ConfigError(f"{where} is now {kind.__name__}({' or '.join(map(_call, later))}).")
    names = [field.name for field in dataclasses.fields(kind)]
    if name in names:
        return ConfigError(f"{where} must be a group of settings.")
    return ConfigError(f"{where} does not exist; did you mean {nearest(name, names)}?")


def _call(path: str) -> str:
    """Spelling of a setting inside a group in a config file."""
    *groups, name = path.split(".")
    text = f"{name!r}: …"
    for group in reversed(groups[1:]):
        text = f"{group!r}: {{{text}}}"
    return f"{groups[0]}={{{text}}}" if groups else f"{name}=…"


def declared(kind: type, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (dotted path, what was declared) of every setting of a class of settings."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from declared(field.type, f"{prefix}{field.name}.")
        elif "help" in field.metadata:
            yield prefix + field.name, field.metadata


# ── Plug-ins ─────────────────────────────────────────────────────────────────────────────────────


PLUGIN_MODULE = "dynmoe_jax_plugin_"
"""What the name of a plug-in's module begins with; its file's name follows."""


def load_plugin(path: str) -> None:
    """Runs a user's own Python file, which registers kinds; one that is loaded is left alone.

    Never called with what a run's folder holds: a file is code, and only its user may name it.

    Raises:
      ConfigError: it is no file, or its code fails.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError(f"--plugin={path} is no Python file; name one that registers kinds.")
    name = f"{PLUGIN_MODULE}{file.stem}"
    if name in sys.modules:
        if Path(inspect.getfile(sys.modules[name])) != file.resolve():
            raise ConfigError(f"--plugin={path} has the name of another plug-in; rename the file.")
        return
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        message = " ".join(str(error).split())
        raise ConfigError(f"--plugin={path} fails: {type(error).__name__}: {message}.") from error
