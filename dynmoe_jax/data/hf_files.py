"""The files of a tokenizer in Hugging Face's format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.hf_tokens import NAMED

MAIN, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
ADDED, MODEL = "added_tokens.json", "tokenizer.model"
TRAVELING = ("chat_template.jinja", "generation_config.json")
FILES = (MAIN, SETTINGS, SPECIAL, ADDED, "vocab.json", "merges.txt", MODEL, *TRAVELING)
"""What travels with a tokenizer, as far as it is there."""


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that reading can begin with."""
    return any((folder / name).is_file() for name in (MAIN, MODEL))


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of the files that are there, by name."""
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the tokens that settings name, by name."""
    found = {name: settings.get(name) for name in NAMED}
    found = {n: t.get("content") if isinstance(t, dict) else t for n, t in found.items()}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def parse(name: str, content: bytes) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      DataError: it holds none.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as JSON ({shortly(error)}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} must hold a JSON object.")
    return value


def shortly(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
