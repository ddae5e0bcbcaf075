"""A ``tokenizer.json`` as it stands, with the tokens that other files of its folder add."""

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from dynmoe_jax.data.tokenizers.hf_files import (
    ADDED,
    MAIN,
    SETTINGS,
    SPECIAL,
    library_tokenizer,
    parse,
)
from dynmoe_jax.data.tokenizers.hf_tokens import NAMED, Token, Tokens, content_of, read_tokens

FLAGS = ("add_bos_token", "add_eos_token")
"""Settings that count where there is no ``tokenizer.json``, whose post-processor decides."""


def plain_tokenizer(files: Mapping[str, bytes]) -> tuple[tokenizers.Tokenizer, Tokens]:
    """The tokenizer of a folder, whatever class its settings name.

    Args:
      files: contents of the folder's files, by name.

    Raises:
      DataError: a file is not what it must be.
      Exception: the library cannot read ``tokenizer.json``.
    """
    main = parse(files, MAIN)
    made = library_tokenizer(files[MAIN], main)
    # Padding and truncation are the business of whoever makes batches.
    made.no_padding()
    made.no_truncation()
    tokens = tokens_of(files, {}, main=main)
    tokens.add_to(made)
    return made, tokens


def tokens_of(
    files: Mapping[str, bytes],
    usual: Mapping[str, Token],
    usual_more: Sequence[Token] | None = None,
    *,
    main: Mapping[str, Any],
) -> Tokens:
    """The tokens that the files of a folder hold, see :func:`read_tokens`."""
    settings, special, added = (parse(files, name) for name in (SETTINGS, SPECIAL, ADDED))
    if MAIN in files:
        settings = {name: value for name, value in settings.items() if name not in FLAGS}
    return read_tokens(settings, special, added, main, usual, usual_more)


def names_of(tokens: Tokens) -> dict[str, str]:
    """Texts of the named tokens, by name."""
    return {name: content_of(tokens.named[name]) for name in NAMED if name in tokens.named}
