"""One run, one workdir: the second process that wants to write there is refused.

The lock is the kernel's (``flock``), so it ends with the process that holds it, however that
ends: a run that was killed never leaves one behind.  It holds between the processes of one
machine, and between machines where their shared file system passes ``flock`` on (NFS does; Lustre
if it is mounted with ``flock``).  Where a file system knows no locks, a warning says so.

Of several processes that train one run, process 0 holds the lock for all.
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
from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import console
from dynmoe_jax.runs.disk import is_seen, not_writable

FILE_NAME = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the folder of a run for this process and those that train with it.

    The file stays when the run ends: to remove it would open a gap for a third process.

    Raises:
      ConfigError: another run holds the folder, it cannot be written to, or it is not the same one
        for all processes of this run.
    """
    if agreement.is_first():
        with _locked_here(workdir):
            agreement.broadcast((workdir / FILE_NAME).read_text(encoding="utf-8"))
            yield
    else:
        _check_shared(workdir, holder=agreement.broadcast(None))
        yield


def _check_shared(workdir: Path, holder: str) -> None:
    """Raises ConfigError unless what process 0 has written can be read here."""
    if not is_seen(lambda: (workdir / FILE_NAME).read_text(encoding="utf-8") == holder):
        raise config.ConfigError(
            f"--workdir={workdir} is another folder here than for process 0; name one on a file "
            "system that all processes share."
        )


@contextlib.contextmanager
def _locked_here(workdir: Path) -> Iterator[None]:
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
