"""What a disk can refuse, in one sentence."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from dynmoe_jax import config

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class DiskError(Exception):
    """The disk does not take what a run has to write; the message is one sentence for the user."""


def not_writable(workdir: Path, error: OSError) -> config.ConfigError:
    """The error for a folder that a run cannot write to."""
    return config.ConfigError(
        f"--workdir={workdir} cannot be written ({error.strerror}); name another folder."
    )


@contextlib.contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turns a full or failing disk, wherever it shows, into a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL + _UNUSABLE:
            raise
        remedy = "make room" if error.errno in _FULL else "mend the disk or the permissions"
        where = error.filename or workdir
        raise DiskError(
            f"{where} could not be written ({error.strerror}); {remedy}, and start the same "
            "command again: it goes on from the newest checkpoint."
        ) from error
