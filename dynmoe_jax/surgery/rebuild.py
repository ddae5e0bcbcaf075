"""Makes a result again from its parents, as its record says."""

from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.perform import perform
from dynmoe_jax.surgery.provenance import FILE_NAME, read_record
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
    if record.get("operation") not in OPERATIONS:
        raise config.ConfigError(
            f"{source / FILE_NAME} names the operation {record.get('operation')!r}, which is not "
            "known here; name the file that registers it with --plugin=FILE."
        )
    kind = OPERATIONS[record["operation"]]
    folders = tuple(Path(parent["folder"]) for parent in record["parents"])
    asked = Request(kind(**record["settings"]), folders, to, Options(**record["options"]))
    with checked(asked) as job:
        for parent, stored in zip(job.parents, record["parents"], strict=True):
            if parent.digest != stored["digest"]:
                raise ConfigError(
                    f"{parent.folder} is not the model that {source} was made of (digest "
                    f"{parent.digest[:12]}… instead of {stored['digest'][:12]}…); bring that back."
                )
    made = perform(asked)
    if made["digest"] != record["digest"]:
        raise ConfigError(
            f"--to={to} has the digest {made['digest'][:12]}…, and --from={source} "
            f"{record['digest'][:12]}…; versions of packages may differ: {record['versions']}."
        )
    return made
