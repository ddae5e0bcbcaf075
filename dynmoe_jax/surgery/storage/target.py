"""Folder of a result: it is there when all of it is."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.data.preparation.abandoned import own_name, remove_abandoned
from dynmoe_jax.data.sources.document import unusable
from dynmoe_jax.data.sources.files import shown
from dynmoe_jax.runs.disk import disk_errors

UNFINISHED = ".unfinished-"
"""Mark behind the name of a result in that of a folder in which it is made."""

_ROUNDS, _QUIET_ROUNDS, _ROUND_SECONDS = 200, 4, 0.05
"""A folder is gone when it is not there so many times in a row."""


def free_place(to: Path) -> Path:
    """Where a result will be, links followed.

    Args:
      to: as the user named it.

    Raises:
      ConfigError: something is there, or no folder can be.
    """
    named = f"--to='{shown(to)}'"
    if unusable(str(to)):
        raise config.ConfigError(f"{named} is no name in UTF-8, which checkpoints need.")
    try:
        place = to.resolve()
        taken = place.exists() and not (place.is_dir() and not any(place.iterdir()))
        above = next(folder for folder in place.parents if folder.is_dir())
        _look_for(above / _unfinished(place))
        _look_for(place)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        why = getattr(error, "strerror", None) or "it is a link that leads to itself"
        raise config.ConfigError(f"{named} cannot be a folder ({why}); name another.") from error
    if taken:
        raise config.ConfigError(f"{named} is not empty; name another folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise config.ConfigError(f"{named} cannot be made ({above} is read-only); name another.")
    return place


def _look_for(path: Path) -> None:
    """Raises OSError for a path that cannot be one, unlike ``exists``: too long, below a file."""
    with contextlib.suppress(FileNotFoundError):
        path.stat()


@contextlib.contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """Yields a folder beside a place, which takes that place at the end of the block.

    Whatever goes wrong leaves nothing of it; what is left of a process that was killed goes when
    the next one begins.

    Args:
      place: from :func:`free_place`.

    Raises:
      ConfigError: the folder cannot be made, or something has come into its place.
      DiskError: the disk is full, or fails.
    """
    unfinished = place.with_name(_unfinished(place))
    try:
        with _refused(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(place.parent, _prefix(place))
            unfinished.mkdir()
        with disk_errors(place, "nothing of it was kept"):
            yield unfinished
        with _refused(place):
            unfinished.replace(place)  # over an empty folder, too
    except BaseException:
        _remove(unfinished)
        raise


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes have left of results in a folder, whatever they were called."""
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        name, mark, _ = path.name.partition(UNFINISHED)
        if mark:
            remove_abandoned(folder, name + mark)


def _remove(folder: Path) -> None:
    """Removes a folder that threads, of a checkpoint that failed, may still be writing into."""
    rounds_without = 0
    for _ in range(_ROUNDS):
        rounds_without = 0 if folder.exists() else rounds_without + 1
        if rounds_without == _QUIET_ROUNDS:
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_ROUND_SECONDS)


@contextlib.contextmanager
def _refused(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise config.ConfigError(
            f"--to={place} cannot be made ({error.strerror}); name another folder."
        ) from error


def _prefix(place: Path) -> str:
    return f"{place.name}{UNFINISHED}"


def _unfinished(place: Path) -> str:
    return own_name(_prefix(place))
