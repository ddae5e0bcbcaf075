"""Registry of sources: the grammar of ``config.data.sources``, and a reader for each kind."""

import difflib
import glob
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dynmoe_jax import config
from dynmoe_jax.data.chat.template import ChatTemplate
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.mixture import is_proportional, parse_cap
from dynmoe_jax.data.part import parse_part
from dynmoe_jax.data.sources.document import Broken, Document
from dynmoe_jax.data.sources.files import read_jsonl, read_text, shown
from dynmoe_jax.data.sources.instructions import read_instructions, read_tasks
from dynmoe_jax.data.sources.parquet import read_parquet
from dynmoe_jax.data.sources.python import read_python
from dynmoe_jax.data.sources.tasks import PARTS
from dynmoe_jax.data.sources.tfds import read_tfds, tfds_identity

KINDS = ("python", "text", "jsonl", "instructions", "tasks", "parquet", "tfds")
_ARGUMENTS = {
    "text": "GLOB",
    "jsonl": "GLOB",
    "instructions": "GLOB",
    "tasks": "PART",
    "parquet": "GLOB",
    "tfds": "NAME",
}
CONVERSATIONS = ("instructions", "tasks")
"""Kinds whose documents are conversations, which a chat template gives their form."""

_END_BYTES = 1 << 16
# Beyond, a domain would not come up in any run; Grain scales weights up to whole numbers.
_LIGHTEST, _HEAVIEST = 1e-6, 1e6


class Source(NamedTuple):
    """One entry of the list: a kind, and its glob or TFDS name (empty for ``python``)."""

    kind: str
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind


def parse_sources(sources: str) -> list[Source]:
    """Reads ``"python,jsonl:books/*.jsonl.zst"``.

    Raises:
      DataError: an entry has an unknown kind, or lacks its argument, or there is none at all.
    """
    found = [_parse_source(entry.strip()) for entry in sources.split(",") if entry.strip()]
    if not found:
        raise DataError(f"config.data.sources={sources!r} names no source; use e.g. 'python'.")
    return found


def _parse_source(entry: str) -> Source:
    kind, colon, argument = entry.partition(":")
    if kind not in KINDS:
        nearest = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        example = f"{nearest}:{_ARGUMENTS[nearest]}" if nearest in _ARGUMENTS else nearest
        raise DataError(f"config.data.sources holds {entry!r}; did you mean {example!r}?")
    if kind in _ARGUMENTS and not argument:
        wanted = f"{kind}:{_ARGUMENTS[kind]}"
        raise DataError(f"config.data.sources holds {entry!r}; write it as {wanted!r}.")
    if kind not in _ARGUMENTS and colon:
        raise DataError(f"config.data.sources holds {entry!r}; write it as {kind!r}.")
    if kind == "tasks" and argument not in PARTS:
        raise DataError(
            f"config.data.sources holds {entry!r}; the parts of tasks are {', '.join(PARTS)}."
        )
    return Source(kind, argument)


def parse_weights(domain_weights: str) -> dict[str, float]:
    """Reads ``"code=2,prose=1"``; an empty string gives an empty dictionary.

    Raises:
      DataError: an entry is no ``domain=number``, its number is out of bounds, a domain comes
        twice, or all weights are zero.
    """
    weights: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in domain_weights.split(","))):
        domain, _, number = entry.rpartition("=")
        domain = domain.strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not domain or not (weight == 0 or _LIGHTEST <= weight <= _HEAVIEST):
            raise DataError(
                f"config.data.domain_weights holds {entry!r}; write 'domain=weight' "
                f"with a weight of zero, or between {_LIGHTEST:g} and {_HEAVIEST:g}."
            )
        if domain in weights:
            raise DataError(f"config.data.domain_weights names {domain!r} twice; name it once.")
        weights[domain] = weight
    if weights and not any(weights.values()):
        raise DataError(
            f"config.data.domain_weights={domain_weights!r} has only zeros; "
            "give at least one domain a weight above zero."
        )
    return weights


def source_files(source: Source) -> list[Path]:
    """The files that a glob matches, sorted; empty for sources that have none.

    A file whose name is the glob, but which it would not match (``"data[1].jsonl"``), is meant
    itself.

    Raises:
      DataError: the glob matches nothing.
    """
    if source.kind in ("python", "tasks", "tfds"):
        return []
    named = os.path.expanduser(source.argument)
    matches = glob.glob(named, recursive=True)
    if named not in matches and os.path.isfile(named):
        matches = [named]
    files = sorted(path for path in map(Path, matches) if path.is_file())
    if not files:
        raise DataError(
            f"config.data.sources holds {str(source)!r}, which matches no file; "
            f"repair the glob (the working folder is {str(Path.cwd())!r})."
        )
    return files


def check_sources(data: config.Data) -> None:
    """Checks cheaply what can be checked before anything is written.

    Raises:
      DataError: the sources or the domain weights cannot be parsed, a glob matches nothing, TFDS
        has no such dataset, or the tokenizer's file does not exist.
    """
    for source in parse_sources(data.sources):
        source_identity(source)
    if is_proportional(data.domain_weights):
        parse_cap(data.domain_weights)
    else:
        parse_weights(data.domain_weights)
    parse_part(data.part)
    # Unlike Path's, these say no to a name that is too long, and to a home that nobody has.
    if data.tokenizer and not os.path.exists(os.path.expanduser(data.tokenizer)):
        raise DataError(
            f"config.data.tokenizer={data.tokenizer!r} does not exist; give the path of a "
            "SentencePiece .model or of a folder with a tokenizer.json, or leave it empty to train "
            "one."
        )


def source_identity(source: Source) -> dict:
    """Identity of a source, which tells whether it still holds the same documents: JSON-able, cheap
    to compute.

    For files: name, size, and a hash of both ends, wherever they lie.  For ``python``: nothing
    more, so that a package installed in the middle of a run does not change the run's data.
    """
    identity: dict = {"kind": source.kind, "files": [*map(_file_identity, source_files(source))]}
    if source.kind == "tasks":
        identity["part"] = source.argument
    if source.kind == "tfds":
        identity["dataset"] = tfds_identity(source.argument)
    return identity


def _file_identity(path: Path) -> list:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(_END_BYTES)
        file.seek(max(size - _END_BYTES, 0))
        ends += file.read(_END_BYTES)
    return [shown(path.name), size, hashlib.sha256(ends).hexdigest()]


def read_documents(
    data: config.Data, template: ChatTemplate | None = None
) -> Iterator[Document | Broken]:
    """Yields the documents of all sources, and what is broken in them, in a fixed order.

    Args:
      data: the settings.
      template: of conversations; None: marks stand before their turns.
    """
    cap_bytes = data.max_megabytes * 1e6 or math.inf
    fields = (data.text_field, data.domain_field)
    for source in parse_sources(data.sources):
        if source.kind == "python":
            yield from read_python(cap_bytes)
        elif source.kind == "tasks":
            yield from read_tasks(source.argument, template)
        elif source.kind == "tfds":
            yield from read_tfds(source.argument, *fields)
        for path in source_files(source):
            if source.kind == "text":
                yield from read_text(path)
            elif source.kind == "jsonl":
                yield from read_jsonl(path, *fields)
            elif source.kind == "instructions":
                yield from read_instructions(path, data.domain_field, template)
            else:
                yield from read_parquet(path, *fields)
