"""Parquet files, one document a row."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from dynmoe_jax.data.document import Broken, Document, checked
from dynmoe_jax.data.files import stem

_ROWS_AT_A_TIME = 256


def read_parquet(path: Path, text_field: str, domain_field: str) -> Iterator[Document | Broken]:
    """One document a row; the file's name stands in for a missing domain.

    Rows count from 1.  A dotted field name reaches into a struct column.
    """
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = {column.path for column in file.schema}
            if text_field not in columns:
                yield Broken(str(path), f"has no column {text_field!r}", file.metadata.num_rows)
                return
            wanted = [name for name in (text_field, domain_field) if name in columns]
            for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=wanted):
                texts = _values(batch, text_field)
                domains = _values(batch, domain_field) if len(wanted) == 2 else None
                for i in range(batch.num_rows):
                    row += 1
                    item = _row(texts, domains, i, f"{path}:{row}", stem(path))
                    if item is not None:
                        yield item
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Broken(f"{path}:{row + 1}", f"cannot be read: {reason}")


def _values(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    if name in batch.schema.names:
        return batch.column(name)
    outer, *inner = name.split(".")
    return pyarrow.compute.struct_field(batch.column(outer), inner)


def _row(texts, domains, i: int, origin: str, stand_in: str) -> Document | Broken | None:
    try:
        text = texts[i].as_py()
        domain = None if domains is None else domains[i].as_py()
    except UnicodeDecodeError as error:
        return Broken(origin, f"not UTF-8 at byte {error.start}")
    return checked(text, domain, origin, stand_in)
