"""Which tokens of a document belong to its responses.

Axis legend: n tokens of a document.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from dynmoe_jax.data.chat.conversation import Span, read_spans

NAME = "responses"
"""Name of the array in a batch: of each target :data:`READ`, :data:`LEARNED` or :data:`UNKNOWN`."""

READ, LEARNED, UNKNOWN = 0, 1, 2
"""A token of a prompt, of a response, or of a document that does not say where responses are."""


def kinds_of_targets(
    example: Mapping[str, bytes],
    text: str,
    ids_n: Int[np.ndarray, "n"],
    encode: Callable[[str], Int[np.ndarray, "_"]],
) -> Int[np.ndarray, "n+1"]:
    """Kind of each token of a document's text, and of EOS behind it.

    A token that reaches over the border of prompt and response belongs to the response.  EOS is
    learned where the document ends with a response.

    Args:
      example: of a prepared data set.
      text: of it.
      ids_n: its tokens.
      encode: of the tokenizer.
    """
    spans = read_spans(example.get(NAME, b"").decode())
    if not spans:
        return np.full(len(ids_n) + 1, UNKNOWN, np.int32)
    kinds = np.full(len(ids_n) + 1, READ, np.int32)
    for begin, end in spans:
        first, last = _tokens_of((begin, end), text, ids_n, encode)
        kinds[first:last] = LEARNED
    if spans[-1][1] == len(text):
        kinds[-1] = LEARNED
    return kinds


def _tokens_of(span: Span, text: str, ids_n, encode) -> Span:
    """First token with a character of a span, and the one behind the last."""
    before, until = (encode(text[:at]) for at in span)
    last = _common(until, ids_n)
    return _common(before, ids_n), last + (last < len(until))


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many numbers at the beginning are alike."""
    length = min(len(some), len(others))
    unlike = np.flatnonzero(np.asarray(some[:length]) != np.asarray(others[:length]))
    return int(unlike[0]) if unlike.size else length
