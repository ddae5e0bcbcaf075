"""Text and JSON Lines files, plain or compressed."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from dynmoe_jax.data.sources.document import Broken, Document, checked, field

# What reading a damaged file can raise; zlib and zstandard have errors of their own.
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file, frame after frame.

    zstandard's own stream reader ends a truncated file like a complete one, so that half a corpus
    can vanish in silence; this one raises EOFError.
    """

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = None
        self._rest = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Always, as :class:`io.RawIOBase` asks for."""
        return True

    def readinto(self, buffer) -> int:
        """Fills the buffer as far as it goes; 0 bytes at the end."""
        while not self._output:
            compressed = self._rest or self._file.read(1 << 16)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the compressed stream is truncated")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(compressed))
            self._rest = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        """Closes the compressed file, too."""
        self._file.close()
        super().close()


def open_bytes(path: Path) -> BinaryIO:
    """The uncompressed bytes of a plain, .gz or .zst file."""
    if path.suffix == ".gz":
        return gzip.GzipFile(path)
    if path.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdStream(path), 1 << 18)
    return path.open("rb")


def shown(path: Path | str) -> str:
    """A path as text: bytes of it that are not UTF-8 are written as ``\\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def stem(path: Path) -> str:
    """The file's name without what tells its format: ``books.jsonl.zst`` → ``books``."""
    name = shown(path.name)
    for suffix in (".gz", ".zst", ".zstd", ".jsonl", ".ndjson", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return name or shown(path.name)


def read_text(path: Path) -> Iterator[Document | Broken]:
    """One document a file, of the domain ``text``."""
    try:
        with open_bytes(path) as stream:
            content = stream.read()
    except READ_ERRORS as error:
        yield Broken(shown(path), reason_of(error))
        return
    document = checked(content.removeprefix(BYTE_ORDER_MARK), None, shown(path), "text")
    if document is not None:
        yield document


def json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """The JSON values of a file, one a line, without a byte order mark at its beginning.

    Only a line feed ends a line: what Unicode calls one besides may stand within a string.

    Yields:
      (number of the line, from 1; its value, or a :class:`Broken` whose origin is ``"FILE:LINE"``);
      nothing for lines of white space.
    """
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if not line.isspace() and line:
                    value, reason = parse_json(line)
                    yield number, Broken(f"{shown(path)}:{number}", reason) if reason else value
    except READ_ERRORS as error:
        yield number + 1, Broken(f"{shown(path)}:{number + 1}", reason_of(error))


def parse_json(content: bytes) -> tuple[object, str | None]:
    """Parses JSON in UTF-8: (the value, None), or (None, what is wrong with it)."""
    try:
        return json.loads(content.decode("utf-8")), None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start}"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return None, f"not JSON: {error.msg} at {line}column {error.colno}"
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        return None, f"not JSON that can be read: {type(error).__name__}"


def read_jsonl(path: Path, text_field: str, domain_field: str) -> Iterator[Document | Broken]:
    """One document a line; the file's name stands in for a missing domain."""
    for number, value in json_lines(path):
        if isinstance(value, Broken):
            yield value
            continue
        origin = f"{shown(path)}:{number}"
        item = _document(value, origin, text_field, domain_field, stem(path))
        if item is not None:
            yield item


def _document(
    record: object, origin: str, text_field: str, domain_field: str, stand_in: str
) -> Document | Broken | None:
    if not isinstance(record, dict):
        return Broken(origin, f"a JSON {type(record).__name__}, not an object")
    try:
        text = field(record, text_field)
    except KeyError:
        return Broken(origin, f"has no field {text_field!r}")
    try:
        domain = field(record, domain_field)
    except KeyError:
        domain = None
    return checked(text, domain, origin, stand_in)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file of text, as Python reads them, without a byte order mark.

    Raises:
      READ_ERRORS, UnicodeDecodeError: it cannot be read, or is not UTF-8.
    """
    with open_bytes(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        for line in text:
            yield line.removesuffix("\n")


def reason_of(error: Exception) -> str:
    """Says in a few words why a file cannot be read."""
    if isinstance(error, EOFError):
        return "the compressed stream is truncated"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be read: {error}"
