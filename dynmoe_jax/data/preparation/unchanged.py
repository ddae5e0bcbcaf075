"""Whether the data of a run is still that which it began with, and whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.data.chat.template import ChatTemplate
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.preparation.prepare import (
    TEMPLATE,
    read_summary,
    settings_of,
    source_fingerprint,
)


def check_unchanged(
    data: config.Data, directory: Path, fingerprint: str, template: ChatTemplate | None = None
) -> None:
    """Raises DataError if the sources would give other documents than a run began with.

    Cheap, and before anything is prepared anew.

    Args:
      data: the settings now.
      directory: where preparations are kept.
      fingerprint: of the preparation that the run began with.
      template: of conversations.
    """
    if source_fingerprint(data, template) == fingerprint:
        return
    try:
        before = read_summary(directory / fingerprint[:16])["settings"]
        what = _difference(before, json.loads(json.dumps(settings_of(data, template))))
    except FileNotFoundError:
        what = "config.data.sources, its files, or how they are read have changed"
    raise DataError(
        f"The run began with other data: {what}; set it back, or start in another --workdir."
    )


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    files_before, files_now = _files(before), _files(now)
    for name, identity in files_before.items():
        if name not in files_now:
            return f"{name} is missing among the files of config.data.sources"
        if identity != files_now[name]:
            return f"{name} has changed since it was prepared"
    new = sorted(set(files_now) - set(files_before))
    if new:
        return f"{new[0]} is new among the files of config.data.sources"
    if before.get(TEMPLATE) != now.get(TEMPLATE):
        return "the tokenizer's chat template has changed"
    for name, value in before.items():
        if name != "sources" and value != now.get(name):
            return f"config.data.{name}={now.get(name)!r} was {value!r}"
    return "config.data.sources has changed"


def _files(settings: dict[str, Any]) -> dict[str, Sequence]:
    """(size, hash) of each file by its name; of files of one name, the last one."""
    return {name: rest for source in settings["sources"] for name, *rest in source["files"]}
