"""Strings that end a text, special tokens among them, which a decoded text leaves out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.tokenizers.endings import special_tokens_of
from dynmoe_jax.inference.pieces import end_of_text

# Of the private use area: no text has them.
_FIRST_MARK = 0x100000


class Stops:
    """Strings that end a text.

    They are looked for in the marked text: the decoded text, in which a mark, one character, stands
    for each special token that one of the strings holds.

    Attributes:
      strings: to look for in a marked text.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer):
        special = {n: t for n, t in special_tokens_of(tokenizer).items() if t}
        texts = {text for text in special.values() if any(text in stop for stop in stops)}
        # The longest first: one may be a part of another.
        ordered = sorted(texts, key=lambda text: (-len(text), text))
        marks = {text: chr(_FIRST_MARK + i) for i, text in enumerate(ordered)}
        self._tokenizer = tokenizer
        self._marks = {n: marks[text] for n, text in special.items() if text in marks}
        self._unmarked = str.maketrans(dict.fromkeys(marks.values(), ""))
        self.strings = [*stops]
        for stop in stops:
            for text, mark in marks.items():
                stop = stop.replace(text, mark)
            if stop not in self.strings:
                self.strings.append(stop)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def mark(self, token: int) -> str:
        """The mark of a token; empty if it has none."""
        return self._marks.get(token, "")

    def read(self, ids: Sequence[int] | Int[np.ndarray, "_"]) -> str:
        """The marked text of tokens."""
        text = self._tokenizer.decode(ids)
        marks = [(position, self.mark(int(token))) for position, token in enumerate(ids)]
        for position, mark in reversed([(position, mark) for position, mark in marks if mark]):
            before = len(self._tokenizer.decode(ids[:position]))
            text = text[:before] + mark + text[before:]
        return text

    def end(self, marked: str) -> int | None:
        """Position of the first stop string in a marked text; None if there is none."""
        return end_of_text(marked, self.strings)

    def before(self, ids: Sequence[int] | Int[np.ndarray, "_"]) -> str:
        """The text of tokens up to the first string that ends it, without marks."""
        marked = self.read(ids)
        return marked[: self.end(marked)].translate(self._unmarked)
