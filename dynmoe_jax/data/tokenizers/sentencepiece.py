"""SentencePiece: a tokenizer trained here, or any ``.model`` file (Llama-2's works unchanged)."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import sentencepiece

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.endings import GENERATION, end_ids, generation_content

# Stretches of text that the trainer sees as one "sentence"; no piece crosses their borders.
_TRAINING_BYTES = 4000
# A longer line is cut, so that stretches are filled however many bytes its characters have.
_LINE_CHARACTERS = _TRAINING_BYTES // 4
# SentencePiece writes a space as this character, and reads this character as a space.
_SPACE = "▁"
# The trainer leaves out every sentence with this character, its own mark of what is unknown.
_UNKNOWN = "▅"
_RESERVED = re.compile(f"[{_SPACE}{_UNKNOWN}]")
_LINE_ENDS = "\r\n"


class SentencePieceTokenizer:
    """Text to token ids and back, see :class:`dynmoe_jax.data.Tokenizer`.

    Args:
      model: content of a ``.model`` file.
      generation: content of the ``generation_config.json`` beside it; None if there is none.

    Attributes:
      generation: that content.

    Raises:
      DataError: the latter cannot be read.
    """

    name_in_run: ClassVar[str] = "tokenizer.model"

    def __init__(self, model: bytes, generation: bytes | None = None):
        self._model, self.generation = model, generation
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.end_ids = end_ids(self.eos_id, generation)
        sp = self._processor
        controls = (token for token in range(self.vocab_size) if sp.is_control(token))
        self.special_tokens = {token: sp.id_to_piece(token) for token in controls}
        self.begins_with_bos = True
        self.ends_with_eos = False
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.token_bytes_V = np.array(
            [self._bytes_of(token) for token in range(self.vocab_size)], dtype=np.int32
        )
        self._space_literal = self._ids_of_space_literal()

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SentencePieceTokenizer":
        """Reads a ``.model`` file.

        Raises:
          DataError: there is no such file, it is no SentencePiece model, or it lacks the tokens
            that begin and end a document.
        """
        remedy = (
            "give the path of a SentencePiece .model or of a folder with a tokenizer.json, or "
            "leave it empty to train one"
        )
        path = Path(path).expanduser()
        try:
            model, beside = path.read_bytes(), path.with_name(GENERATION)
            generation = beside.read_bytes() if beside.is_file() else None
        except OSError as error:
            raise DataError(
                f"config.data.tokenizer={str(path)!r} cannot be read ({error.strerror}); {remedy}."
            ) from error
        try:
            # SentencePiece would take an empty file.
            tokenizer = cls(model, generation) if model else None
        except DataError as error:
            raise DataError(f"{path.parent}: {error}") from error
        except (RuntimeError, ValueError, IndexError, OSError):
            # The last three: a damaged model may load, and fail when it is asked for a piece.
            tokenizer = None
        if tokenizer is None:
            raise DataError(f"config.data.tokenizer={str(path)!r} is no tokenizer; {remedy}.")
        if min(tokenizer.bos_id, tokenizer.eos_id) < 0:
            raise DataError(
                f"config.data.tokenizer={str(path)!r} has no BOS or no EOS token, which "
                "separate documents; use a model that was trained with both."
            )
        return tokenizer

    def save(self, path: Path) -> None:
        """Writes the ``.model`` file, whole or not at all: a run may be killed here."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(self._model)
        unfinished.replace(path)
        if self.generation is not None:
            path.with_name(GENERATION).write_bytes(self.generation)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int32, without BOS and EOS."""
        if self._space_literal is None or _SPACE not in text:
            return np.array(self._processor.encode(text), dtype=np.int32)
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += self._space_literal if i else []
            ids += self._processor.encode(part)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; control tokens give nothing, nor do ids without a token."""
        return self._processor.decode([int(token) for token in ids if token < self.vocab_size])

    def with_ends(self, ends: Sequence[int]) -> "SentencePieceTokenizer":
        """The same with these ``end_ids``, besides EOS."""
        return SentencePieceTokenizer(self._model, generation_content(ends))

    def _bytes_of(self, token: int) -> int:
        sp = self._processor
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            return 0
        if sp.is_byte(token):
            return 1
        return len(sp.id_to_piece(token).replace(_SPACE, " ").encode())

    def _ids_of_space_literal(self) -> list[int] | None:
        """Byte tokens for the one character that SentencePiece would turn into a space.

        None where that cannot be repaired: no byte tokens, or a space put before every text.
        """
        sp = self._processor
        ids = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        prefixed = sp.id_to_piece(sp.encode("a")[0]).startswith(_SPACE)
        return ids if all(map(sp.is_byte, ids)) and not prefixed else None


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: Path, reserved: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a byte-pair tokenizer and writes it to ``path``.

    Every text can be written with it and read back exactly: characters without a token fall back
    to bytes, white space is kept as it is, nothing is normalised.  Pieces may hold several words
    and line ends, which makes tokens longer; BPE trains much faster than unigram, to longer tokens
    (docs/measurements.md: tokenizer-pieces, tokenizer-bpe).

    Args:
      texts: what to train on; the same texts give the same tokenizer.
      vocab_size: exact number of tokens.
      path: the ``.model`` file to write.
      reserved: special tokens besides, which no text is written with.

    Raises:
      DataError: the texts are too small for the vocabulary, or it is too small for the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_stretches(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_whitespace=False,
            split_digits=True,
            max_sentence_length=2 * _TRAINING_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(reserved),
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _untrainable(vocab_size, error, len(reserved)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(path)
    return tokenizer


def _stretches(texts: Iterable[str]) -> Iterator[str]:
    """The texts in stretches of whole lines, where those are short enough.

    Nothing is left out but what the trainer cannot see: the two characters that mean something else
    to it, which :meth:`SentencePieceTokenizer.encode` writes as bytes, and line ends at the end of
    a text.
    """
    for text in texts:
        stretch = ""
        for part in _parts(text):
            if not part or len((stretch + part).encode()) > _TRAINING_BYTES:
                # It strips line ends from the end of a sentence: they begin the next one.
                shown = stretch.rstrip(_LINE_ENDS)
                if shown:
                    yield shown
                # Of line ends alone, as many as leave room.
                rest = stretch[len(shown) :] if shown else stretch[-_TRAINING_BYTES // 2 :]
                stretch = rest if part else ""
            stretch += part
        if shown := stretch.rstrip(_LINE_ENDS):
            yield shown


def _parts(text: str) -> Iterator[str]:
    """Lines, or parts of long ones; empty where a reserved character stood."""
    for line in text.splitlines(keepends=True):
        for number, clear in enumerate(_RESERVED.split(line)):
            if number:
                yield ""
            for start in range(0, len(clear), _LINE_CHARACTERS):
                yield clear[start : start + _LINE_CHARACTERS]


def _untrainable(vocab_size: int, error: RuntimeError, reserved: int) -> DataError:
    setting = f"config.model.vocab_size={vocab_size}"
    if "sentences_.empty()" in str(error):
        return DataError(
            "config.data.sources gives no text to train a tokenizer on; name other sources, or a "
            "tokenizer with config.data.tokenizer."
        )
    limit = re.search(r"set it to a value <= (\d+)", str(error))
    if limit:
        return DataError(
            f"{setting} is more than the {limit[1]} tokens that the text for the tokenizer "
            "gives; lower it, raise config.data.tokenizer_megabytes, or add text."
        )
    fewer = f", or have fewer than {reserved} special tokens reserved" if reserved else ""
    return DataError(
        f"{setting} does not fit the text for the tokenizer ({error}); raise it{fewer}."
    )
