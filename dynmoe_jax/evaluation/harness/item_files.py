"""Files with the items of a task, read as the data pipeline reads its own."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.data.sources.document import Broken, well_formed
from dynmoe_jax.data.sources.files import (
    BYTE_ORDER_MARK,
    READ_ERRORS,
    json_lines,
    open_bytes,
    parse_json,
    reason_of,
    shown,
)

SUFFIXES = tuple(
    form + how for form in (".jsonl", ".json") for how in ("", ".gz", ".zst")
)  # fmt: skip

Item = dict[str, Any]
_Path = tuple[str, ...]
_ANY = "[]"
_NAMED = 5


def find_items(data_dir: Path, names: list[str], *, optional: bool = False) -> Path | None:
    """The file with a task's items.

    Args:
      data_dir: where to look, folders in it included.
      names: what the file may be called, before its suffix; the first that is there is taken.
      optional: return None if there is none.

    Raises:
      ConfigError: there is none, or two of one name.
    """
    found = _matches(data_dir, names)
    if not found and optional:
        return None
    if not found:
        raise config.ConfigError(
            f"--data_dir={shown(data_dir)} has no items of the task {names[0]}; put them there as "
            f"{names[0]}.jsonl."
        )
    if len(found) > 1:
        raise config.ConfigError(
            f"--data_dir={shown(data_dir)} has the task {names[0]} twice, as {shown(found[0])} and "
            f"{shown(found[1])}; keep one of them."
        )
    return found[0]


def _matches(data_dir: Path, names: list[str]) -> list[Path]:
    """The files of the first of the names that there are any of."""
    files = [path for path in sorted(data_dir.rglob("*.*")) if path.name.endswith(SUFFIXES)]
    for name in names:
        wanted = {name + suffix for suffix in SUFFIXES}
        found = [path for path in files if path.name in wanted and path.is_file()]
        if found:
            return found
    return []


def read_items(path: Path) -> list[Item]:
    """The items of a file: a record a line, a list, or BIG-Bench's ``{"examples": [...]}``.

    They are those of the standard library's ``json``, but that

    - a lone surrogate, which no tokenizer takes, becomes U+FFFD;
    - numbers, and what else is no string, become text in a field that holds text in other items;
    - a field that other items have is there, and ``None``.

    All of this is said.

    Raises:
      ConfigError: the file cannot be read, or holds no records.
    """
    items = _lines(path) if ".jsonl" in path.suffixes else _whole(path)
    if not items:
        raise config.ConfigError(f"{shown(path)} must hold records, one at least.")
    try:
        return _alike(_encodable(items, path), path)
    except RecursionError as error:
        raise config.ConfigError(
            f"{shown(path)} is nested too deeply to be read; give records of a task."
        ) from error


def _lines(path: Path) -> list[Item]:
    items = []
    for number, value in json_lines(path):
        where = f"{shown(path)}, line {number},"
        if isinstance(value, Broken):
            raise config.ConfigError(
                f"{where} cannot be read as JSON ({value.reason}); give a record on each line."
            )
        if not isinstance(value, dict):
            raise config.ConfigError(
                f"{where} must hold records, not a {type(value).__name__}; give one on each line."
            )
        items.append(value)
    return items


def _whole(path: Path) -> list[Item]:
    try:
        with open_bytes(path) as stream:
            value, reason = parse_json(stream.read().removeprefix(BYTE_ORDER_MARK))
    except READ_ERRORS as error:
        value, reason = None, reason_of(error)
    if reason:
        hint = "call it .jsonl if each of its lines is a record"
        raise config.ConfigError(f"{shown(path)} cannot be read as JSON ({reason}); {hint}.")
    items = value.get("examples") if isinstance(value, dict) else value
    if not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
        raise config.ConfigError(
            f"{shown(path)} must hold records: a list of them, or one that has them as 'examples'."
        )
    return items


def _encodable(items: list[Item], path: Path) -> list[Item]:
    """The items without lone surrogates."""
    found = [_well_formed(item) for item in items]
    # By their text: a NaN is not equal to itself.
    changed = [i for i, pair in enumerate(zip(items, found, strict=True), 1) if _differ(*pair)]
    if changed:
        warn(
            f"{shown(path)}: {len(changed):,} of {len(items):,} items hold lone surrogates, which "
            f"no encoding has, the first is item {changed[0]}; they are read as U+FFFD."
        )
    return found


def _differ(one: Item, other: Item) -> bool:
    return json.dumps(one) != json.dumps(other)


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [_well_formed(part) for part in value]
    if isinstance(value, dict):
        return {well_formed(name): _well_formed(part) for name, part in value.items()}
    return value


def _alike(items: list[Item], path: Path) -> list[Item]:
    """The items with the fields of all of them, and text where some have text."""
    kinds: dict[_Path, dict[bool, int]] = defaultdict(dict)
    for number, item in enumerate(items, 1):
        for keys, is_text in _scalars(item, ()):
            kinds[keys].setdefault(is_text, number)
    mixed = {keys: first for keys, first in kinds.items() if len(first) == 2}
    if mixed:
        found = [f"{'.'.join(p)!r} (item {f[True]}, item {f[False]})" for p, f in mixed.items()]
        warn(
            f"{shown(path)}: text in some items and something else in others are {_some(found)}; "
            "they are read as text everywhere."
        )
    lacking = {}
    for name in dict.fromkeys(name for item in items for name in item):
        lacking[name] = [number for number, item in enumerate(items, 1) if name not in item]
    found = [f"{name!r} ({len(n):,}, the first is item {n[0]})" for name, n in lacking.items() if n]
    if found:
        warn(
            f"{shown(path)}: some of the {len(items):,} items lack {_some(found)}, which is None "
            "there."
        )
    texts = [_as_text(item, (), mixed.keys()) for item in items] if mixed else items
    return [{name: item.get(name) for name in lacking} for item in texts]


def _some(found: list[str]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more


def _scalars(value: Any, keys: _Path):
    """(where it stands, whether it is text) of every string, number and truth value."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _scalars(part, (*keys, name))
    elif isinstance(value, list):
        for part in value:
            yield from _scalars(part, (*keys, _ANY))
    elif value is not None:
        yield keys, isinstance(value, str)


def _as_text(value: Any, keys: _Path, mixed) -> Any:
    if isinstance(value, dict):
        return {name: _as_text(part, (*keys, name), mixed) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_text(part, (*keys, _ANY), mixed) for part in value]
    if value is None or isinstance(value, str) or keys not in mixed:
        return value
    return json.dumps(value)
