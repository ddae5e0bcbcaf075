"""Text and JSON Lines files, plain or compressed."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from dynmoe_jax.data.document import Broken, Document, checked, field

# What reading a damaged file can raise; zlib and zstandard have errors of their own.
READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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


def stem(path: Path) -> str:
    """The file's name without what tells its format: ``books.jsonl.zst`` → ``books``."""
    name = path.name
    for suffix in (".gz", ".zst", ".zstd", ".jsonl", ".ndjson", ".json", ".parquet"):
        name = name.removesuffix(suffix)
    return name or path.name


def read_text(path: Path) -> Iterator[Document | Broken]:
    """One document a file, of the domain ``text``."""
    try:
        with open_bytes(path) as stream:
            content = stream.read()
    except READ_ERRORS as error:
        yield Broken(str(path), _reason(error))
        return
    document = checked(content.removeprefix(_BYTE_ORDER_MARK), None, str(path), "text")
    if document is not None:
        yield document


def read_jsonl(path: Path, text_field: str, domain_field: str) -> Iterator[Document | Broken]:
    """One document a line; the file's name stands in for a missing domain."""
    number = 0
    try:
        with open_bytes(path) as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                item = _read_line(line, f"{path}:{number}", text_field, domain_field, stem(path))
                if item is not None:
                    yield item
    except READ_ERRORS as error:
        yield Broken(f"{path}:{number + 1}", _reason(error))


def _read_line(
    line: bytes, origin: str, text_field: str, domain_field: str, stand_in: str
) -> Document | Broken | None:
    if line.isspace():
        return None
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(origin, f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Broken(origin, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # endless digits, endless nesting
        return Broken(origin, f"not JSON that can be read: {type(error).__name__}")
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


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the compressed stream is truncated"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be read: {error}"
