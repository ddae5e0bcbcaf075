"""Parquet files, one document a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from dynmoe_jax.data.sources.document import Broken, Document, checked
from dynmoe_jax.data.sources.files import shown, stem

_ROWS_AT_A_TIME = 256
_TEXTS = (
    types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
    types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_null,
)  # fmt: skip


class _Column(NamedTuple):
    """Column and type of the values of a field."""

    name: str
    inside: tuple[str, ...]
    type: pyarrow.DataType

    def values(self, batch: pyarrow.RecordBatch) -> pyarrow.Array:
        column = batch.column(batch.schema.get_field_index(self.name))
        return pyarrow.compute.struct_field(column, list(self.inside)) if self.inside else column


class _Refused(Exception):
    """A file has no column that a field can be read from; the message is a few words."""


def read_parquet(path: Path, text_field: str, domain_field: str) -> Iterator[Document | Broken]:
    """One document a row; the file's name stands in for a missing domain.

    Rows count from 1.  A dotted field name reaches into a struct column, where no column has that
    name itself.  Texts are strings, or bytes in UTF-8; domains may be whole numbers too.
    """
    row = 0
    try:
        # Arrow opens no file whose name is not UTF-8.
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as file:
            try:
                text, domain = _columns(file.schema_arrow, text_field, domain_field)
            except _Refused as refused:
                yield Broken(shown(path), str(refused), file.metadata.num_rows)
                return
            wanted = [text_field] if domain is None else [text_field, domain_field]
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=wanted):
                texts = text.values(batch)
                domains = None if domain is None else domain.values(batch)
                for i in range(batch.num_rows):
                    row += 1
                    item = _row(texts, domains, i, f"{shown(path)}:{row}", stem(path))
                    if item is not None:
                        yield item
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Broken(f"{shown(path)}:{row + 1}", f"cannot be read: {reason}")


def _columns(
    schema: pyarrow.Schema, text_field: str, domain_field: str
) -> tuple[_Column, _Column | None]:
    text, domain = _find(schema, text_field), _find(schema, domain_field)
    if text is None:
        raise _Refused(f"has no column {text_field!r}")
    if not _is_text(text.type):
        raise _Refused(f"the column {text_field!r} is of type {text.type}, not of strings")
    if domain is not None and not (_is_text(domain.type) or _is_integer(domain.type)):
        raise _Refused(f"the column {domain_field!r} is of type {domain.type}, not of strings")
    return text, domain


def _find(schema: pyarrow.Schema, field: str) -> _Column | None:
    """The column of a field, or what is within a struct; None if there is none."""
    if (index := _index(schema, field, field)) is not None:
        return _Column(field, (), schema.field(index).type)
    name, *inside = field.split(".")
    if not inside or (index := _index(schema, name, field)) is None:
        return None
    found = schema.field(index).type
    for part in inside:
        if not types.is_struct(found) or (index := _index(found, part, field)) is None:
            return None
        found = found.field(index).type
    return _Column(name, tuple(inside), found)


def _index(fields: pyarrow.Schema | pyarrow.StructType, name: str, field: str) -> int | None:
    found = fields.get_all_field_indices(name)
    if len(found) > 1:
        inside = "" if name == field else f" on the way to {field!r}"
        raise _Refused(f"has {len(found)} columns {name!r}{inside}, of which one is meant")
    return found[0] if found else None


def _is_text(kind: pyarrow.DataType) -> bool:
    return any(is_one(_plain(kind)) for is_one in _TEXTS)


def _is_integer(kind: pyarrow.DataType) -> bool:
    return types.is_integer(_plain(kind))


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """The type of the values: of a dictionary's, and of JSON, which is stored as strings."""
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return kind.storage_type if isinstance(kind, pyarrow.JsonType) else kind


def _row(texts, domains, i: int, origin: str, stand_in: str) -> Document | Broken | None:
    try:
        text = texts[i].as_py()
        domain = None if domains is None else domains[i].as_py()
    except UnicodeDecodeError as error:
        return Broken(origin, f"not UTF-8 at byte {error.start}")
    return checked(text, domain, origin, stand_in)
