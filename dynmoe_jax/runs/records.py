"""Numbers on disk as JSON that any reader accepts.

JSON has no NaN and no infinity, and most readers refuse a file that holds them.  A non-finite
float is therefore written as ``null``, and ``null`` is read back as NaN: a plot shows a gap there.
"""

import json
import math
import os
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as strict JSON; arrays become lists, non-finite floats become ``null``."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def from_json(text: str) -> Any:
    """The value that :func:`to_json` wrote, with NaN for ``null``."""
    return _null_to_nan(json.loads(text))


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` so that a reader, or a crash, finds the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A byte-fallback tokenizer can produce lone surrogates; they must not cost us the file.
    with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy and JAX scalars and arrays
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _null_to_nan(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {name: _null_to_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_null_to_nan(part) for part in value]
    return value
