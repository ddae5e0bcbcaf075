"""A SentencePiece model as a tokenizer of Hugging Face's library, as ``AutoTokenizer`` makes it."""

import re
from collections.abc import Iterable, Mapping

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.hf_tokens import Token

_SPACE = "▁"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNIGRAM, _BPE = 1, 2


class Model:
    """Contents of a ``tokenizer.model``.

    Attributes:
      vocabulary: ids of pieces.
      is_bpe: whether it is a byte-pair model; a unigram one otherwise.
      puts_space_before: whether a space is put before a text.
      control: pieces that stand for no text.
      user_defined: pieces that are never cut.
      tokens: named tokens, such as ``bos_token``.

    Raises:
      DataError: the file is no SentencePiece model of these two kinds.
    """

    def __init__(self, content: bytes):
        self._proto = sentencepiece_model_pb2.ModelProto()
        try:
            self._proto.ParseFromString(content)
        except DecodeError:
            raise DataError("tokenizer.model is no SentencePiece model.") from None
        spec = self._proto.trainer_spec
        pieces = self._proto.pieces
        if not pieces or spec.model_type not in (_UNIGRAM, _BPE):
            raise DataError("tokenizer.model is no unigram and no byte-pair model.")
        self.is_bpe: bool = spec.model_type == _BPE
        self.puts_space_before: bool = self._proto.normalizer_spec.add_dummy_prefix
        self.vocabulary = {piece.piece: number for number, piece in enumerate(pieces)}
        self.control = [piece.piece for piece in pieces if piece.type == _CONTROL]
        self.user_defined = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
        ends = {"unk": spec.unk_id, "bos": spec.bos_id, "eos": spec.eos_id}
        self.tokens: dict[str, Token] = {
            f"{name}_token": getattr(spec, f"{name}_piece")
            for name, number in ends.items()
            if number >= 0
        }

    def merges(self) -> list[tuple[str, str]]:
        """Every way to make a piece of two, in the order of the pieces."""
        return merges_of(self.vocabulary)

    def tokenizer(self, renamed: Mapping[int, str], legacy: bool) -> Tokenizer:
        """A tokenizer that follows all settings of the model.

        Args:
          renamed: texts of pieces by id, instead of the model's.
          legacy: whether each stretch between added tokens, and not the first one alone, is a text
            of its own, which gets a space put before it.
        """
        taken = {t for t, number in self.vocabulary.items() if number not in renamed}
        texts = [piece.piece for piece in self._proto.pieces]
        for number, text in renamed.items():
            if 0 <= number < len(texts) and text not in taken:
                texts[number] = text
        made = Tokenizer(self._model(texts))
        made.normalizer = self._normalizer(legacy)
        whole = [
            t for t, p in zip(texts, self._proto.pieces, strict=True) if p.type == _USER_DEFINED
        ]
        cuts = []
        if self.puts_space_before:
            scheme = "always" if legacy else "first"
            cuts.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False))
        if whole:
            pattern = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
            cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
        if cuts:
            made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        made.decoder = self._decoder()
        return made

    def _model(self, texts: list[str]) -> models.Model:
        spec, pieces = self._proto.trainer_spec, self._proto.pieces
        if not self.is_bpe:
            scored = [(text, piece.score) for text, piece in zip(texts, pieces, strict=True)]
            return models.Unigram(scored, spec.unk_id, spec.byte_fallback)
        normal = [number for number, piece in enumerate(pieces) if piece.type == _NORMAL]
        ranked = sorted(normal, key=lambda number: (-pieces[number].score, number))
        return models.BPE(
            vocab={text: number for number, text in enumerate(texts)},
            merges=merges_of(texts[number] for number in ranked),
            unk_token=spec.unk_piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            ignore_merges=bool(self.user_defined),
        )

    def _normalizer(self, legacy: bool) -> normalizers.Normalizer:
        spec, steps = self._proto.normalizer_spec, []
        if spec.precompiled_charsmap:
            steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        if spec.remove_extra_whitespaces:
            steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if spec.escape_whitespaces:
            steps.append(normalizers.Replace(" ", _SPACE))
        if spec.add_dummy_prefix and legacy:
            # Metaspace puts no space before one, SentencePiece does.
            steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), 2 * _SPACE))
        return normalizers.Sequence(steps)

    def _decoder(self) -> decoders.Decoder:
        steps = [decoders.Replace(_SPACE, " ")]
        if self._proto.trainer_spec.byte_fallback:
            steps.append(decoders.ByteFallback())
        if self.puts_space_before:
            steps += [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        elif self._proto.trainer_spec.byte_fallback:
            steps.append(decoders.Fuse())
        return decoders.Sequence(steps)


def merges_of(ranked: Iterable[str]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others.

    Args:
      ranked: the pieces, the one that is merged first at the beginning.
    """
    ranked = list(ranked)
    known = set(ranked)
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def found_whole(texts: Iterable[str], special: bool) -> list[AddedToken]:
    """Added tokens that are found in a text as it is."""
    return [AddedToken(text, normalized=False, special=special) for text in texts]
