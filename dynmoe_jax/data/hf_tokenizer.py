"""Tokenizers in Hugging Face's format: a folder with ``tokenizer.json``, by their own library."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers

from dynmoe_jax.data.endings import GENERATION, end_ids, generation_content
from dynmoe_jax.data.errors import DataError

MAIN, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
FILES = (
    MAIN, SETTINGS, _SPECIAL, "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", GENERATION,
)  # fmt: skip
"""What travels with a tokenizer, as far as it is there."""


class HfTokenizer:
    """Text to token ids and back, see :class:`dynmoe_jax.data.Tokenizer`.

    Special tokens that stand in a text, such as ``<|im_end|>``, are read as those tokens, unless
    the settings split them (``split_special_tokens``).  A
    tokenizer without a token that begins a document (Qwen's, OLMoE's) begins it with the one that
    ends it.

    Attributes:
      files: contents of its files, by name.
    """

    place: ClassVar[str] = "tokenizer"

    def __init__(self, files: dict[str, bytes]):
        """Makes one of the contents of its files, by name.

        Raises:
          DataError: they are no tokenizer, or lack the token that ends a document.
        """
        self.files = files
        try:
            # The library raises Exception itself.
            self._tokenizer = tokenizers.Tokenizer.from_str(files[MAIN].decode())
            main = json.loads(files[MAIN])
            settings = json.loads(files.get(_SPECIAL, b"{}"))
            settings |= json.loads(files.get(SETTINGS, b"{}"))
        except Exception as error:
            raise DataError(f"{MAIN} or {SETTINGS} cannot be read: {_shortly(error)}.") from error
        # Padding and truncation are the business of whoever makes batches.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        eos = self._id_of(settings, "eos_token")
        if eos is None:
            raise DataError(f"{SETTINGS} names no eos_token that {MAIN} has; documents need one.")
        bos = self._id_of(settings, "bos_token")
        self.eos_id: int = eos
        self.bos_id: int = eos if bos is None else bos
        self.end_ids = end_ids(eos, files.get(GENERATION))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {n: token.content for n, token in added.items() if token.special}
        # Which it says by what its post-processor does.
        self.begins_with_bos: bool = self._tokenizer.encode("a").ids[:1] == [self.bos_id]
        self.fingerprint = hashlib.sha256(
            b"".join(files.get(name, b"") + b"\0" for name in (MAIN, SETTINGS, _SPECIAL))
        ).hexdigest()
        self.token_bytes_V = _token_bytes(self._tokenizer, main)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "HfTokenizer":
        """Reads a folder.

        Raises:
          DataError: it holds no tokenizer, or one without the token that ends a document.
        """
        folder = Path(folder)
        if not (folder / MAIN).is_file():
            raise DataError(f"{folder} holds no {MAIN}.")
        try:
            files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
            return cls(files)
        except (OSError, DataError) as error:
            raise DataError(f"{folder} holds no tokenizer: {error}") from error

    def save(self, path: Path) -> None:
        """Writes the folder, whole or not at all: a run may be killed here."""
        unfinished = path.with_name(path.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, content in self.files.items():
            (unfinished / name).write_bytes(content)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.replace(path)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, without BOS and EOS."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; control tokens give nothing."""
        known = [int(token) for token in ids if token < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def with_ends(self, ends: Sequence[int]) -> "HfTokenizer":
        """The same with these ``end_ids``, besides EOS."""
        return HfTokenizer(self.files | {GENERATION: generation_content(ends)})

    def _id_of(self, settings: dict[str, Any], name: str) -> int | None:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None


def _token_bytes(tokenizer: tokenizers.Tokenizer, main: dict[str, Any]) -> np.ndarray:
    """Bytes of text by token: of control tokens none."""
    # Byte-level tokens are written with one character a byte.
    bytes_as_characters = '"ByteLevel"' in json.dumps(main.get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    lengths_V = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), np.int32)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number >= len(lengths_V):
            continue
        if number in added:
            length = 0 if added[number].special else len(added[number].content.encode())
        elif bytes_as_characters:
            length = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            length = 1
        else:
            length = len(token.replace("▁", " ").encode())
        lengths_V[number] = length
    return lengths_V


def _shortly(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
