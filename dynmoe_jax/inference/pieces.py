"""The text of tokens as they come, and the strings that end it."""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Int

from dynmoe_jax.data import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Pieces:
    """The text that each token adds behind a prompt.

    A token of one byte of a longer character adds nothing; the last one of them adds the character.

    Args:
      tokenizer: of the model.
      prompt: tokens before them.
      mark: the mark of a token in the marked text; none has one by default.

    Attributes:
      pieces: of each token so far; joined, they are the text but for an unfinished character.
      marks: of each token so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] | Int[np.ndarray, "_"],
        mark: Callable[[int], str] = lambda token: "",
    ):
        self._tokenizer, self._mark = tokenizer, mark
        self._ids = [int(token) for token in prompt]
        # Decoded, the prompt may be shorter than it was: some tokenizers drop white space.
        self._prompt = self._known = tokenizer.decode(self._ids)
        self.pieces: list[str] = []
        self.marks: list[str] = []

    def add(self, ids: Iterable[int]) -> None:
        """Tokens that come next."""
        for token in ids:
            self._ids.append(int(token))
            whole = self._tokenizer.decode(self._ids).rstrip(_BROKEN)
            self.pieces.append(whole[len(self._known) :])
            self.marks.append(self._mark(int(token)))
            self._known = max(self._known, whole, key=len)

    @property
    def marked(self) -> str:
        """The pieces, each with its mark behind it."""
        pairs = zip(self.pieces, self.marks, strict=True)
        return "".join(piece + mark for piece, mark in pairs)

    def up_to(self, end: int) -> list[str]:
        """The pieces of the tokens that the first ``end`` characters of the marked text hold."""
        return pieces_up_to(self.pieces, end, self.marks)

    @property
    def text(self) -> str:
        """All of it, an unfinished character as a replacement character."""
        return self._tokenizer.decode(self._ids)[len(self._prompt) :]


def end_of_text(text: str, stops: Sequence[str]) -> int | None:
    """Position where the first of the strings that end a text begins; None if there is none."""
    found = [text.find(stop) for stop in stops if stop in text]
    return min(found, default=None)


def undecided(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may turn out to be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def pieces_up_to(pieces: Sequence[str], end: int, marks: Sequence[str] = ()) -> list[str]:
    """The pieces of the tokens that the first ``end`` characters of the text come from.

    Args:
      pieces: of all tokens.
      end: in the text, or in the marked one.
      marks: of the tokens, each behind its piece in the marked text; none there if left out.
    """
    kept, length = [], 0
    for piece, mark in itertools.zip_longest(pieces, marks, fillvalue=""):
        if length >= end:
            break
        kept.append(piece[: end - length])
        length += len(piece) + len(mark)
    return kept
