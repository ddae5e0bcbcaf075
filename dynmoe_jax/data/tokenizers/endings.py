"""Tokens that end a text which a model writes: EOS, and those of ``generation_config.json``.

A model that was taught to converse ends its turn with a token of its own, which is not always the
one that ends a document.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dynmoe_jax.data.errors import DataError

GENERATION = "generation_config.json"
"""The file in which transformers keeps them; it lies beside a tokenizer's own."""

_EOS = "eos_token_id"
_MOST = 2**31 - 1


def end_ids(eos_id: int, content: bytes | None) -> tuple[int, ...]:
    """Tokens that end a text, rising.

    Args:
      eos_id: the token that ends a document, always one of them.
      content: of ``generation_config.json``; None where there is none.

    Raises:
      DataError: that is no JSON object, or names something that is no token.
    """
    if content is None:
        return (eos_id,)
    try:
        settings = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{GENERATION} cannot be read as JSON: {reason}.") from error
    if not isinstance(settings, dict):
        raise DataError(f"{GENERATION} must hold a JSON object.")
    return tuple(sorted({eos_id, *named_ends(settings, GENERATION)}))


def named_ends(settings: Mapping[str, Any], file: str) -> list[int]:
    """Tokens that settings name under ``eos_token_id``: none, one, or a list of them.

    Args:
      settings: of a model, in Hugging Face's format.
      file: where they stand, for messages.

    Raises:
      DataError: what is named is no token.
    """
    value = settings.get(_EOS)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int or token > _MOST for token in found):
        raise DataError(
            f"{file} has {_EOS}={repr(value)[:100]}, which must be the number of a token, or a "
            "list of them."
        )
    # -1 stands for none.
    return [token for token in found if token >= 0]


def generation_content(ends: Sequence[int]) -> bytes:
    """The ``generation_config.json`` that names some tokens."""
    return json.dumps({_EOS: list(ends)}, indent=2).encode() + b"\n"


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text: a tokenizer's ``end_ids``, or EOS where it names no others."""
    return getattr(tokenizer, "end_ids", (tokenizer.eos_id,))


def special_tokens_of(tokenizer: Any) -> Mapping[int, str]:
    """Texts of the tokens that decoding leaves out; none where a tokenizer does not tell."""
    return getattr(tokenizer, "special_tokens", {})
