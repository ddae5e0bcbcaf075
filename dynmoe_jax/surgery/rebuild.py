"""Makes a result again from its parents, as its record says."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.perform import perform
from dynmoe_jax.surgery.report.provenance import FILE_NAME, read_record
from dynmoe_jax.surgery.request import Options, Request, checked


def rebuild(source: Path, to: Path) -> dict[str, Any]:
    """Makes a result again.

    Args:
      source: folder of a result, of which nothing but the record is read.
      to: folder of the new one.

    Returns:
      its record.

    Raises:
      ConfigError: there is no record, a parent has changed, or the new result is another one.
      CheckpointError, DataError: as from :func:`~dynmoe_jax.surgery.perform.perform`.
    """
    record = read_record(source)
    asked = _request(record, source, to)
    with checked(asked) as job:
        for parent, stored in zip(job.parents, record["parents"], strict=True):
            if parent.digest != stored["digest"]:
                raise ConfigError(
                    f"{parent.folder} is not the model that {source} was made of (digest "
                    f"{parent.digest[:12]}… instead of {stored['digest'][:12]}…); bring that back."
                )
    made = perform(asked)
    for name, what in (("digest", "parameters"), ("moments_digest", "moments")):
        before = record.get(name, "")
        if made[name] != before:
            shutil.rmtree(to)
            raise ConfigError(
                f"The {what} came out with the digest {made[name][:12]}…, not {before[:12]}… of "
                f"--from={source}, and were not kept; it was made with {_told(record)}."
            )
    return made


def _request(record: Mapping[str, Any], source: Path, to: Path) -> Request:
    """The request that a record is of."""
    file, name = source / FILE_NAME, record.get("operation")
    if name not in OPERATIONS:
        raise ConfigError(
            f"{file} names the operation {name!r}, which is not known here; name the file that "
            "registers it with --plugin=FILE."
        )
    try:
        folders = tuple(Path(parent["folder"]) for parent in record["parents"])
        options = Options(**record["options"])
        return Request(OPERATIONS[name](**record["settings"]), folders, to, options)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} is not what this version writes ({error}); rebuild with {_told(record)}."
        ) from error


def _told(record: Mapping[str, Any]) -> str:
    versions = record.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items())
