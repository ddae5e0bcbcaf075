"""Places of tokens in words, of any tokenizer.

Axis legend: V vocabulary, T tokens.
"""

import numpy as np
from jaxtyping import Bool, Int

from dynmoe_jax.data import Tokenizer


class Words:
    """Tells where words begin, by the white space of tokens.

    A piece that begins with white space ("▁the") begins a word, and so does one behind white space
    or at the beginning of what the model reads.  White space alone, and control tokens, are no part
    of a word.  Tokens are decoded when they are first met.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        anchor = tokenizer.encode("a").tolist()
        self._anchor, self._before = anchor, tokenizer.decode(anchor)
        self._known_V = np.zeros(tokenizer.vocab_size, bool)
        self._spaced_V = np.zeros(tokenizer.vocab_size, bool)
        self._blank_V = np.zeros(tokenizer.vocab_size, bool)
        self._ends_V = np.zeros(tokenizer.vocab_size, bool)

    def text(self, token: int) -> str:
        """The text of a token inside of a text, its white space included."""
        return self._tokenizer.decode([*self._anchor, token])[len(self._before) :]

    def _meet(self, token_T: Int[np.ndarray, "T"]) -> None:
        for token in np.unique(token_T):
            if not self._known_V[token]:
                text = self.text(int(token))
                self._known_V[token] = True
                self._spaced_V[token] = text[:1].isspace()
                self._blank_V[token] = not text or text.isspace()
                self._ends_V[token] = not text or text[-1:].isspace()

    def places(
        self, token_T: Int[np.ndarray, "T"], begins_T: Bool[np.ndarray, "T"]
    ) -> Int[np.ndarray, "T"]:
        """Pieces before each one in its word; -1 for what is no part of a word.

        Args:
          token_T: tokens of texts that follow each other.
          begins_T: where a text begins.
        """
        self._meet(token_T)
        behind_space_T = np.concatenate([[True], self._ends_V[token_T[:-1]]])
        starts_T = begins_T | behind_space_T | self._spaced_V[token_T] | self._blank_V[token_T]
        index_T = np.arange(len(token_T))
        place_T = index_T - np.maximum.accumulate(np.where(starts_T, index_T, 0))
        return np.where(self._blank_V[token_T], -1, place_T)
