"""The files of a tokenizer in Hugging Face's format."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.endings import GENERATION

MAIN, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, MODEL, CONFIG = "added_tokens.json", "tokenizer.model", "config.json"
TEMPLATE = "chat_template.jinja"
TRAVELING = (TEMPLATE, GENERATION)
FILES = (MAIN, SETTINGS, SPECIAL, ADDED, "vocab.json", "merges.txt", MODEL, *TRAVELING)
"""Files that travel with a tokenizer, as far as they are there."""
LARGEST_ID = 2**24
"""Tables of all ids, here and in the library, are as long as the largest one."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that reading can begin with."""
    return any((folder / name).is_file() for name in (MAIN, MODEL))


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of the files that are there, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in a file; an empty one if the file is not there.

    Args:
      files: contents by name.
      name: of the file.

    Raises:
      DataError: the file holds something else.
    """
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as JSON ({shortly(error)}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} must hold a JSON object.")
    return value


def library_tokenizer(content: bytes, main: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer of a ``tokenizer.json``.

    Args:
      content: of the file.
      main: what it holds.

    Raises:
      DataError: it has what ends the process in the library, or fills the memory.
      Exception: the library cannot read it.
    """
    _check_template(main.get("post_processor"))
    if isinstance(main.get("model"), dict):
        _check_model(main["model"])
    return tokenizers.Tokenizer.from_str(content.decode())


def _check_model(model: Mapping[str, Any]) -> None:
    """Checks the largest id, and that each merge of two tokens makes a third."""
    vocabulary = model.get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    largest = max((number for number in ids if type(number) is int), default=0)
    if largest > LARGEST_ID:
        raise DataError(
            f"{MAIN} has {len(ids)} tokens, of which one has the id {largest}; no model has more "
            f"than {LARGEST_ID}."
        )
    if not isinstance(vocabulary, dict):
        return
    prefix = str(model.get("continuing_subword_prefix") or "")
    for merge in model.get("merges") or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(map(_is_text, parts)):
            raise DataError(f"its merges have {merge!r}, which is no pair of tokens.")
        left, right = parts
        if not right.startswith(prefix) or left + right[len(prefix) :] not in vocabulary:
            raise DataError(f"its merges have {left!r} and {right!r}, which make no token.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_template(part: Any) -> None:
    """Checks that a template describes the special tokens that it puts around a text."""
    if isinstance(part, dict):
        for step in [*(part.get("single") or []), *(part.get("pair") or [])]:
            token = step.get("SpecialToken") if isinstance(step, dict) else None
            if token and token.get("id") not in (part.get("special_tokens") or {}):
                raise DataError(f"its post-processor does not describe {token.get('id')!r}.")
        for inner in part.get("processors") or []:
            _check_template(inner)


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever the library ``tokenizers`` raises into a sentence.

    Args:
      what: the sentence's beginning, such as ``"tokenizer.json cannot be read"``.

    Raises:
      DataError: the library raised something, which is Exception itself, or a panic of its Rust.
    """
    try:
        yield
    except (DataError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {shortly(error)}.") from error


def shortly(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters, without a stop at the end."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")
