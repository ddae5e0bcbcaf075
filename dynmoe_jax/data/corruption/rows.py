"""Rows of corrupted documents: examples are made as large as the rest of a row, and never cut.

Where an example lies, how large it is and what it draws is a function of the seed and of its
document and offset alone: so these two numbers are all there is to remember between rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from dynmoe_jax.data.corruption.corruption import LEARNED, Corrupt, Example

LEAST = 8
"""Positions at the end of a row that an example is begun for; fewer are padding."""

LATER = "document"
"""Entry of a row: number of the document that the rows behind it begin with or go on with."""


class CorruptedRows(grain.IterDataset):
    """The rows of corrupted documents, in the order of the documents.

    A row has what :mod:`dynmoe_jax.data.packing` says, and :data:`.corruption.LEARNED`.  Every
    example is a segment that begins with BOS.

    Args:
      documents: random access to examples of the data, without an end.
      encode: (an example of the data) -> its ids behind BOS, EOS the last of them.
      corrupt: what makes examples.
      bos_id: token that begins an example.
      seq_len: positions of a row.
      key: of the draws.
    """

    def __init__(
        self,
        documents: grain.MapDataset,
        encode: Callable[[Mapping], Int[np.ndarray, "M"]],
        corrupt: Corrupt,
        bos_id: int,
        seq_len: int,
        key: int,
    ):
        self.documents, self.encode, self.corrupt = documents, encode, corrupt
        self.bos_id, self.seq_len, self.key = bos_id, seq_len, key
        super().__init__(documents)

    def __iter__(self) -> grain.DatasetIterator:
        return _CorruptedRowsIterator(self)


class _CorruptedRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: CorruptedRows):
        super().__init__()
        self._rows = rows
        self._document, self._offset = 0, 0
        self._ids: Int[np.ndarray, M] | None = None

    def __next__(self) -> dict[str, Any]:
        rows, length = self._rows, self._rows.seq_len
        names = ("tokens", "targets", "segment_ids", "positions", LEARNED)
        row = {name: np.zeros(length, np.int32) for name in names}
        start, segment = 0, 0
        while start == 0 or length - start >= LEAST:
            segment += 1
            example = self._example(length - start)
            ids = np.concatenate([[rows.bos_id], example.inputs, example.targets])
            end = start + len(ids) - 1
            row["tokens"][start:end] = ids[:-1]
            row["targets"][start:end] = ids[1:]
            row["segment_ids"][start:end] = segment
            row["positions"][start:end] = np.arange(end - start)
            row[LEARNED][end - len(example.targets) : end] = 1
            start = end
        return row | {LATER: self._document + bool(self._offset)}

    def _example(self, room: int) -> Example:
        if self._ids is None:
            self._ids = self._rows.encode(self._rows.documents[self._document])
        place = [0, 0, self._offset, self._document]
        draw = np.random.Generator(np.random.Philox(key=self._rows.key, counter=place))
        example = self._rows.corrupt(self._ids[self._offset :], room, draw)
        self._offset += example.taken
        if self._offset == len(self._ids):
            self._document, self._offset, self._ids = self._document + 1, 0, None
        return example

    def get_state(self) -> dict[str, int]:
        """The document that the next example is of, and how many of its ids are done."""
        return {"document": self._document, "offset": self._offset}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a state."""
        self._document, self._offset, self._ids = state["document"], state["offset"], None
