"""Tokenizers in Hugging Face's format: a folder with ``tokenizer.json``, by their own library."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.endings import GENERATION, end_ids, generation_content
from dynmoe_jax.data.tokenizers.hf_around import around
from dynmoe_jax.data.tokenizers.hf_files import (
    MAIN,
    SETTINGS,
    SPECIAL,
    TEMPLATE,
    contents,
    holds_tokenizer,
    library_errors,
    parse,
)
from dynmoe_jax.data.tokenizers.hf_folder import read_folder
from dynmoe_jax.data.tokenizers.hf_plain import names_of, plain_tokenizer

# What transformers takes out of decoded text, where the settings ask for it.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
    (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
_CLEANS = "clean_up_tokenization_spaces"
_CLEANS_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


class HfTokenizer:
    """Text to token ids and back, see :class:`dynmoe_jax.data.Tokenizer`.

    Special tokens that stand in a text, such as ``<|im_end|>``, are read as those tokens, unless
    the settings split them (``split_special_tokens``).  A tokenizer without a token that begins a
    document (Qwen's, OLMoE's) begins it with the one that ends it.

    Attributes:
      files: contents of its files, by name.
      chat_template: of conversations, and the texts of named tokens that it may use; None where the
        folder has none.
    """

    name_in_run: ClassVar[str] = "tokenizer"

    def __init__(self, files: dict[str, bytes]):
        """Makes one of the contents of its files, by name.

        Raises:
          DataError: they are no tokenizer, or lack the token that ends a document.
        """
        self.files = files
        with library_errors(f"{MAIN} or {SETTINGS} cannot be read"):
            self._tokenizer, tokens = plain_tokenizer(files)
        settings = parse(files, SPECIAL) | parse(files, SETTINGS)
        self._tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens"))
        is_bpe = isinstance(self._tokenizer.model, tokenizers.models.BPE)
        self._cleans = bool(settings.get(_CLEANS) and (not is_bpe or settings.get(_CLEANS_BPE)))
        # Ids may have gaps.
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=0)
        named = {name: self._tokenizer.token_to_id(t) for name, t in names_of(tokens).items()}
        eos, bos = named.get("eos_token"), named.get("bos_token")
        if eos is None:
            raise DataError(f"{SETTINGS} names no eos_token that {MAIN} has; documents need one.")
        self.eos_id: int = eos
        self.bos_id: int = eos if bos is None else bos
        self.end_ids = end_ids(eos, files.get(GENERATION))
        self.chat_template = _chat_template(files, settings, names_of(tokens))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {n: token.content for n, token in added.items() if token.special}
        with library_errors(f"the post-processor of {MAIN} fails"):
            before, after = around(self._tokenizer)
        self.begins_with_bos: bool = before[:1] == [self.bos_id]
        self.ends_with_eos: bool = after[-1:] == [self.eos_id]
        self.fingerprint = hashlib.sha256(
            b"".join(files.get(name, b"") + b"\0" for name in (MAIN, SETTINGS, SPECIAL))
        ).hexdigest()
        self.token_bytes_V = _token_bytes(self._tokenizer, self.vocab_size)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "HfTokenizer":
        """Reads a folder as ``AutoTokenizer`` of transformers does.

        Raises:
          DataError: it holds no tokenizer, one without the token that ends a document, or one that
            cannot be read as transformers reads it.
        """
        return cls._loaded(Path(folder), read_folder)

    @classmethod
    def load_kept(cls, folder: str | os.PathLike) -> "HfTokenizer":
        """Reads a folder that :meth:`save` has written.

        Raises:
          DataError: it holds no tokenizer, or one without the token that ends a document.
        """
        return cls._loaded(Path(folder), contents)

    @classmethod
    def _loaded(cls, folder: Path, read: Callable[[Path], dict[str, bytes]]) -> "HfTokenizer":
        if not holds_tokenizer(folder):
            raise DataError(
                f"{folder} holds no {MAIN} and no tokenizer.model; name a folder that holds one, "
                "or a SentencePiece .model."
            )
        try:
            return cls(read(folder))
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
        """Token ids of a text, int32, without BOS and EOS.

        Raises:
          DataError: it holds what no token stands for, and the tokenizer has none for such.
        """
        with library_errors(f"the tokenizer cannot encode {text[:40]!r}"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; control tokens give nothing, nor do ids without a token."""
        known = [int(token) for token in ids if token < self.vocab_size]
        text = self._tokenizer.decode(known, skip_special_tokens=True)
        for spaced, joined in _CLEANED if self._cleans else ():
            text = text.replace(spaced, joined)
        return text

    def with_ends(self, ends: Sequence[int]) -> "HfTokenizer":
        """The same with these ``end_ids``, besides EOS."""
        return HfTokenizer(self.files | {GENERATION: generation_content(ends)})


def _chat_template(
    files: dict[str, bytes], settings: Mapping[str, Any], names: dict[str, str]
) -> tuple[str, dict[str, str]] | None:
    """The template for conversations without tools, where several have names, with the tokens."""
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {
            each.get("name"): each.get("template") for each in source if isinstance(each, dict)
        }
        source = named.get("default")
    if TEMPLATE in files:
        source = files[TEMPLATE].decode(errors="replace")
    return (source, names) if isinstance(source, str) else None


def _token_bytes(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """Bytes of text by token: of control tokens none."""
    # Byte-level tokens are written with one character a byte.
    bytes_as_characters = "ByteLevel" in repr(tokenizer.decoder)
    added = tokenizer.get_added_tokens_decoder()
    lengths_V = np.zeros(vocab_size, np.int32)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
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
