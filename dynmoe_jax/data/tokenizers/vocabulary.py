"""Token ids against the rows of a model's embedding, of which there may be fewer.

Read without a check, an id beyond the last row is taken for the last one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.api import Tokenizer
from dynmoe_jax.data.tokenizers.endings import special_tokens_of


def check_ids(
    ids: Sequence[int] | np.ndarray, rows: int, tokenizer: Tokenizer | None = None
) -> None:
    """Checks that each id has a row.

    Args:
      ids: of tokens.
      rows: of the embedding, ``config.model.vocab_size``.
      tokenizer: tells the token's text for the message.

    Raises:
      DataError: one has none.
    """
    ids = np.asarray(ids)
    without = ids[(ids < 0) | (ids >= rows)]
    if without.size:
        raise DataError(f"{without_row(int(without[0]), rows, tokenizer)}; leave it out.")


def without_row(token: int, rows: int, tokenizer: Tokenizer | None = None) -> str:
    """The beginning of a sentence about a token that has no row; arguments as above."""
    text = f" ({token_text(tokenizer, token)!r})" if tokenizer is not None else ""
    return (
        f"token {token}{text} has no row in the embedding of the model, which has {rows} rows "
        "(config.model.vocab_size)"
    )


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, of a special token too."""
    return special_tokens_of(tokenizer).get(token) or tokenizer.decode([token])


def for_rows(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """The tokenizer of a model: one that refuses text with an id that has no row.

    Args:
      tokenizer: any.
      rows: of the model's embedding.
    """
    return tokenizer if tokenizer.vocab_size <= rows else _WithinRows(tokenizer, rows)


class _WithinRows:
    """A tokenizer with more ids than there are rows; ``vocab_size`` counts those that have one."""

    def __init__(self, tokenizer: Tokenizer, rows: int):
        self._tokenizer, self.vocab_size = tokenizer, rows

    def __getattr__(self, name: str) -> Any:
        if name == "_tokenizer":  # asked for by what copies an object
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32; raises DataError for one that has no row."""
        ids = self._tokenizer.encode(text)
        check_ids(ids, self.vocab_size, self._tokenizer)
        return ids
