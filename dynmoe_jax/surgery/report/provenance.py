"""Provenance of a result: ``surgery.json``, enough to make it again."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from dynmoe_jax import __version__, config
from dynmoe_jax.runs.records import from_json, to_json, write_atomically

FILE_NAME = "surgery.json"
_PACKAGES = ("jax", "flax", "numpy", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Versions of what the numbers of a result depend on."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"dynmoe_jax": __version__, "python": platform.python_version(), **found}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes ``surgery.json`` into a folder."""
    write_atomically(folder / FILE_NAME, to_json(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a result.

    Raises:
      ConfigError: the folder has none, or it cannot be read.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        raise config.ConfigError(
            f"--from={folder} has no {FILE_NAME}; name the folder of a result of surgery."
        )
    try:
        record = from_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise config.ConfigError(f"{file} is not whole ({error}); bring it back.") from error
    if not isinstance(record, dict):
        raise config.ConfigError(f"{file} holds no record of surgery; bring it back.")
    return record
