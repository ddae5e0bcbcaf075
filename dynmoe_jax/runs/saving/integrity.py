"""Whether a checkpoint on disk is what was written: a list of its files with sizes and checksums.

Orbax finds damage in its own indices, but not in the arrays: bits that were flipped in an array's
data file were restored as other numbers without a word (docs/measurements.md: orbax-bit-flips); its
Zarr format has no checksum for data.  CRC-32 because the danger is accidents, not forgery: it
finds every single flipped bit, and takes less than SHA-256 from the training that goes on meanwhile
(docs/measurements.md: checksum-speed).
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE_NAME = "checksums.json"
# Orbax writes these after the list; nothing of the state is in them.
_NOT_LISTED = (FILE_NAME, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK_BYTES = 1 << 18
"""Small enough that the C library keeps little of it in each thread that saves
(docs/measurements.md: save-chunk-memory)."""


def write_checksums(folder: Path, after: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Lists every file below ``folder`` in a file of its own there.

    Args:
      folder: of the checkpoint.
      after: is called with the number of bytes whenever some were read.
    """
    listed = {name: _checksum(folder / name, after) for name in _files(folder)}
    _write_list(folder, listed)


def replace_checksum(folder: Path, name: str) -> None:
    """Lists a file anew that was written anew; of the others nothing is read.

    Args:
      folder: of the checkpoint.
      name: of the file, from there.
    """
    listed = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    _write_list(folder, listed | {name: _checksum(folder / name)})


def find_damage(folder: Path, items: tuple[str, ...], within: str = "") -> str | None:
    """Describes the damage of a checkpoint in a few words; None if it is as it was written.

    Reads all of it.  A checkpoint without a list (of an earlier version) is only looked at for
    whether its items are there.

    Args:
      folder: of the checkpoint.
      items: the folders that it must have.
      within: one of them, to look at nothing else.
    """
    try:
        listed = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        wanted = {
            name: (int(size), int(crc))
            for name, (size, crc) in listed.items()
            if name.startswith(f"{within}/" if within else "")
        }
    except FileNotFoundError:
        missing = [item for item in items if not (folder / item).is_dir()]
        return f"{missing[0]} is missing" if missing else None
    except (ValueError, AttributeError, TypeError):
        return f"{FILE_NAME} cannot be read"
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: _damage_of(folder / name, *wanted[name]), wanted)
        return next(
            (f"{name} {what}" for name, what in zip(wanted, found, strict=True) if what), None
        )


def _write_list(folder: Path, listed: dict[str, tuple[int, int]]) -> None:
    with (folder / FILE_NAME).open("w", encoding="utf-8") as file:
        json.dump(listed, file)
        file.flush()
        os.fsync(file.fileno())


def _damage_of(path: Path, size: int, crc: int) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"has {path.stat().st_size:,} bytes instead of {size:,}"
        return None if _checksum(path)[1] == crc else "has changed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _checksum(path: Path, after: Callable[[int], None] = lambda num_bytes: None) -> tuple[int, int]:
    """Size in bytes, and CRC-32."""
    size = crc = 0
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(chunk):
            size, crc = size + read, zlib.crc32(chunk[:read], crc)
            after(read)
    return size, crc


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in _NOT_LISTED:
            yield path.relative_to(folder).as_posix()
