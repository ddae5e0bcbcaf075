"""One run, one workdir: the second process that wants to write there is refused.

The lock is the kernel's (``flock``), so it ends with the process that holds it, however that
ends: a run that was killed never leaves one behind.  It holds between the processes of one
machine, and between machines where their shared file system passes ``flock`` on (NFS does; Lustre
if it is mounted with ``flock``).  Where a file system knows no locks, a warning says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.console import console
from dynmoe_jax.training.disk import not_writable

FILE_NAME = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the folder of a run for this process.

    The file stays when the run ends: to remove it would open a gap for a third process.

    Raises:
      ConfigError: another process holds the folder, or it cannot be written to.
    """
    try:
        # Not truncated: until the lock is ours, the text in it is another run's.
        file = (workdir / FILE_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise not_writable(workdir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise config.ConfigError(
                f"--workdir={workdir} is in use by {_holder(file.read())}; wait for it, stop it, "
                "or name another --workdir."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            console.print(
                f"The file system of {workdir} knows no locks ({error.strerror}); make sure that "
                "no other run uses this folder.",
                soft_wrap=True,
                markup=False,
            )
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return f"process {holder['pid']} on host {holder['host']}, since {since}"
    except (ValueError, KeyError, TypeError):  # it has the lock, but has not yet said who it is
        return "another process, which has only just started"
