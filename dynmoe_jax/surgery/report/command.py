"""The command that makes a result again, and settings as a person reads them."""

import dataclasses
import inspect
import shlex
from collections.abc import Mapping
from typing import Any

from dynmoe_jax.fields import shown
from dynmoe_jax.registry import PLUGIN_MODULE
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.request import Options

PROGRAM = "python -m dynmoe_jax.surgery"


def command_of(record: Mapping[str, Any], to: str = "FOLDER") -> str:
    """A command that makes a result again, with a flag in every line.

    Args:
      record: of the result.
      to: where it is made.
    """
    flags = [f"--from={parent['folder']}" for parent in record["parents"]]
    told = [*settings_told(record), *told_of(Options, record["options"])]
    flags.append(f"--to={to}")
    flags += [f"--{name}={text_of(value)}" for name, value, default, _ in told if value != default]
    if plugin := _plugin(record["operation"]):
        flags.insert(0, f"--plugin={plugin}")
    return " \\\n    ".join([f"{PROGRAM} {record['operation']}", *map(shlex.quote, flags)])


def text_of(value: Any) -> str:
    """The value of a setting as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def settings_told(record: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """(name, value, default, help) of the settings of a result's operation; the last two are empty
    where it is not known here."""
    return told_of(OPERATIONS.get(record["operation"]), record["settings"])


def told_of(kind: type | None, values: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """(name, value, default, help) of stored settings."""
    fields = {field.name: field for field in dataclasses.fields(kind)} if kind else {}
    return [
        (
            name,
            *(shown(fields[name], each) for each in (value, fields[name].default)),
            fields[name].metadata["help"],
        )
        if name in fields
        else (name, value, "", "")
        for name, value in values.items()
    ]


def _plugin(operation: str) -> str:
    """The file of an operation that is none of the project's own; empty for all others."""
    kind = OPERATIONS.get(operation)
    return inspect.getfile(kind) if kind and kind.__module__.startswith(PLUGIN_MODULE) else ""
