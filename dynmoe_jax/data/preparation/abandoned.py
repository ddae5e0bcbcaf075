"""Folders in which a process is at work: their names say whose they are."""

import os
import shutil
import socket
from pathlib import Path


def own_name(prefix: str) -> str:
    """The name of a folder that this process works in."""
    return f"{prefix}{socket.gethostname()}-{os.getpid()}"


def remove_abandoned(directory: Path, prefix: str) -> None:
    """Removes what killed processes of this machine left unfinished, and what this one did.

    Args:
      directory: which their folders are in.
      prefix: with which their names begin, as in :func:`own_name`.
    """
    start = f"{prefix}{socket.gethostname()}-"
    for folder in list(directory.iterdir()):
        process = folder.name.removeprefix(start)
        if folder.name.startswith(start) and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Whether it is another process that is there."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True
