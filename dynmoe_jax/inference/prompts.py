"""Prompts from files and flags; every mistake is one sentence."""

from pathlib import Path

from dynmoe_jax.config import ConfigError
from dynmoe_jax.data.sources.document import Broken, unusable
from dynmoe_jax.data.sources.files import READ_ERRORS, json_lines, reason_of, shown, text_lines

_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".zst", ".zstd")


def read_prompts(path: Path) -> list[str]:
    r"""Prompts of a file: a line each, or in ``.jsonl`` a string, or a record with ``prompt``.

    Both may be compressed (``.gz``, ``.zst``).  ``\n`` in a line of plain text is two characters;
    prompts of several lines need ``.jsonl``.

    Raises:
      ConfigError: it cannot be read, a line is no prompt, or there is none.
    """
    flag = f"--prompts_file={shown(path)}"
    kind = _kind(path)
    if kind == ".json":
        raise ConfigError(
            f"{flag} is neither text nor JSON Lines by its name; call it .jsonl if each of its "
            "lines is a prompt in JSON, or .txt."
        )
    prompts = _of_json_lines(path, flag) if kind in _LINES else _of_text(path, flag)
    if not prompts:
        raise ConfigError(f"{flag} holds no prompt; write one on each line.")
    return prompts


def check_text(text: str, where: str) -> None:
    """Raises ConfigError if no model can read a text; ``where`` says where it comes from."""
    if reason := unusable(text):
        raise ConfigError(f"{where} {reason}; give text in UTF-8.")


def _kind(path: Path) -> str:
    """Suffix of a file's name, without that of its compression."""
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _of_json_lines(path: Path, flag: str) -> list[str]:
    prompts = []
    for number, value in json_lines(path):
        where = f"{flag}, line {number},"
        if isinstance(value, Broken):
            raise ConfigError(f"{flag}, line {number}: {value.reason}; give JSON Lines in UTF-8.")
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise ConfigError(f"{where} must be a string, or a record with a string 'prompt'.")
        check_text(prompt, where)
        prompts.append(prompt)
    return prompts


def _of_text(path: Path, flag: str) -> list[str]:
    try:
        numbered = [(n, line) for n, line in enumerate(text_lines(path), 1) if line.strip()]
    except READ_ERRORS as error:
        reason = reason_of(error).removeprefix("cannot be read: ")
        raise ConfigError(f"{flag} cannot be read ({reason}); give a text file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} cannot be read (not UTF-8); give a text file.") from error
    for number, line in numbered:
        check_text(line, f"{flag}, line {number},")
    return [line for _, line in numbered]
