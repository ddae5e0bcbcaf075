"""Errors of a disk, each in one sentence."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dynmoe_jax import config

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

_SEEN_WITHIN_S = 60


class DiskError(Exception):
    """The disk does not take what a run has to write; the message is one sentence for the user."""


def not_writable(workdir: Path, error: OSError) -> config.ConfigError:
    """The error for a folder that a run cannot write to."""
    return config.ConfigError(
        f"--workdir={workdir} cannot be written ({error.strerror}); name another folder."
    )


def check_folder_name(setting: str, name: str) -> None:
    """Raises ConfigError if a setting names a folder that there cannot be."""
    path = os.path.expanduser(name)
    why = "no such home" if path.startswith("~") else None
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        why = error.strerror
    if why:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise config.ConfigError(
            f"config.{setting}={shown!r} cannot be a folder ({why}); name another."
        )


def is_seen(look: Callable[[], bool]) -> bool:
    """Waits for what another process has written to show here, too; returns whether it does.

    A network file system may take its time, up to a minute, to show it.

    Args:
      look: whether it does; an OSError means that it does not.
    """
    until = time.monotonic() + _SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if look():
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


@contextlib.contextmanager
def disk_errors(
    workdir: Path, then: str = "it goes on from the newest checkpoint"
) -> Iterator[None]:
    """Turns a full or failing disk, wherever it shows, into a DiskError.

    Args:
      workdir: the folder that is written to.
      then: what the same command does when it is started again.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL + _UNUSABLE:
            raise
        remedy = "make room" if error.errno in _FULL else "repair the disk or the permissions"
        where = error.filename or workdir
        raise DiskError(
            f"{where} could not be written ({error.strerror}); {remedy}, and start the same "
            f"command again: {then}."
        ) from error
