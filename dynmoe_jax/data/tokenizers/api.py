"""Interface of tokenizers, and the choice of the kind that lies at a path."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from dynmoe_jax.console import warn
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.endings import GENERATION
from dynmoe_jax.data.tokenizers.hf import HfTokenizer
from dynmoe_jax.data.tokenizers.hf_files import ADDED, SETTINGS, SPECIAL
from dynmoe_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      name_in_run: its file or folder in a run's folder.
      vocab_size: the largest token id + 1; ids may have gaps.
      bos_id: token that begins a document.
      eos_id: token that ends a document.
      end_ids: tokens that end a text which a model writes: ``eos_id``, and others where the model
        was taught so.
      special_tokens: texts of the tokens that decoding leaves out.
      begins_with_bos: whether a model expects the former before a text that it is given.
      ends_with_eos: whether other programs put the latter after each text; documents end with it
        anyhow, and texts that a model goes on with do not.
      token_bytes_V: int32 of ``vocab_size``, UTF-8 bytes of text that each token stands for; 0 for
        control tokens.  Over the tokens of ``encode(text)`` they sum up to ``len(text.encode())``
        (plus one for tokenizers that put a space before every text, like Llama-2's).
      fingerprint: hex SHA-256 of what it was made of.
    """

    name_in_run: ClassVar[str]
    vocab_size: int
    bos_id: int
    eos_id: int
    end_ids: tuple[int, ...]
    special_tokens: dict[int, str]
    begins_with_bos: bool
    ends_with_eos: bool
    token_bytes_V: np.ndarray
    fingerprint: str

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all: a run may be killed here."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, without BOS and EOS."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; control tokens give nothing, nor do ids without a token."""

    def with_ends(self, ends: Sequence[int]) -> "Tokenizer":
        """The same with these ``end_ids``, besides EOS."""


KINDS = (SentencePieceTokenizer, HfTokenizer)


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer at a path: a folder in Hugging Face's format, or a SentencePiece ``.model``.

    A folder is read as ``AutoTokenizer`` of transformers reads it.

    Raises:
      DataError: there is none, or it lacks the tokens that begin and end a document.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return HfTokenizer.load(path)
    beside = [name for name in (ADDED, SPECIAL, SETTINGS) if path.with_name(name).is_file()]
    if beside:
        warn(f"{path} is read alone; name its folder to have {', '.join(beside)} read too.")
    return SentencePieceTokenizer.load(path)


def find_tokenizer(workdir: Path) -> Path | None:
    """Path of the tokenizer in a run's folder; None if it has none."""
    paths = (workdir / kind.name_in_run for kind in KINDS)
    return next((path for path in paths if path.exists()), None)


def kept_tokenizer(workdir: Path) -> Tokenizer:
    """The tokenizer that lies in a run's folder, as it was saved there.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    path = find_tokenizer(workdir)
    if path is None:
        raise DataError(f"{workdir} holds no tokenizer.")
    return HfTokenizer.load_kept(path) if path.is_dir() else SentencePieceTokenizer.load(path)


def remove_tokenizer(workdir: Path) -> None:
    """Makes room for another one, which may be of another kind."""
    (workdir / GENERATION).unlink(missing_ok=True)
    while (path := find_tokenizer(workdir)) is not None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
