"""A file of documents on their way from the sources to the prepared dataset.

Which documents are kept, and on which side of the held-out split, is known only when all have
been read; until then the texts lie here and only a few numbers per document are in memory.
"""

import hashlib
import json
from array import array
from pathlib import Path
from typing import NamedTuple

from dynmoe_jax.data.sources.document import Document


class Entry(NamedTuple):
    """Entry of a document in the spool: what is known without reading it again.

    Attributes:
      hash: of the text; 64 bits, the same for equal texts and for nothing else in practice.
      size: of the text in UTF-8 bytes.
      index: its number in the spool.
    """

    hash: int
    size: int
    index: int


class Spool:
    """Documents on disk, in the order in which they came."""

    def __init__(self, path: Path):
        self._file = path.open("w+b")
        self._offsets = array("Q", [0])
        self.entries: dict[str, list[Entry]] = {}  # by domain

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def add(self, document: Document) -> None:
        """Appends a document."""
        text = document.text.encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        entry = Entry(int.from_bytes(digest), len(text), len(self))
        self.entries.setdefault(document.domain, []).append(entry)
        written = self._file.write(json.dumps(document).encode())
        self._offsets.append(self._offsets[-1] + written)

    def read(self, index: int) -> Document:
        """The document with this number."""
        start, stop = self._offsets[index : index + 2]
        self._file.seek(start)
        return Document(*json.loads(self._file.read(stop - start)))
