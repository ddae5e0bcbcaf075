"""The tokenizer of an exported model, in files that transformers reads."""

import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from dynmoe_jax.console import warn
from dynmoe_jax.data import SentencePieceTokenizer, Tokenizer
from dynmoe_jax.data.tokenizers.hf import HfTokenizer
from dynmoe_jax.data.tokenizers.hf_classes import CLASS_OF_MODEL
from dynmoe_jax.data.tokenizers.hf_files import CONFIG, MAIN, SETTINGS, parse
from dynmoe_jax.data.tokenizers.hf_sentencepiece import merges_of

_SPACE = "▁"
PROBES = (
    "The quick brown fox, 12345 times.",
    "  two  spaces,\ttabs\t\tand\n\n\nlines \r\n ",
    "def f(x):\n    return x ** 2  # ▁ is no space\n",
    "naïve café, 数据并行, Ελληνικά, 🙂🙃, \u200b\u00a0\ufeff",
    "<s> </s> <unk> <0x41> <pad>",
    "aaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 25 + "=" * 25,
    " ",
    "",
)
"""Texts of which a converted tokenizer must give the same ids."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files of one of Hugging Face's format again, and converts one of SentencePiece.

    The latter is written as ``tokenizer.model`` too.  One that cannot be converted (unigram, or
    with normalized text) is written only so, with a warning.

    Args:
      tokenizer: the model's.
      folder: of the exported model; its ``config.json`` is there already.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        for name, content in _with_class(tokenizer.files, folder).items():
            (folder / name).write_bytes(content)
        return
    # With the generation_config.json, if it has one.
    path = folder / SentencePieceTokenizer.name_in_run
    tokenizer.save(path)
    files = hf_files(path)
    converted = HfTokenizer(files)
    if any(converted.encode(t).tolist() != tokenizer.encode(t).tolist() for t in PROBES):
        warn(
            f"The SentencePiece model has no equal in Hugging Face's format; {folder.name} holds "
            f"it as {path.name} alone."
        )
        # Where there is no tokenizer.json, transformers puts BOS before a text if it is told to.
        settings = json.loads(files[SETTINGS]) | {"add_bos_token": True}
        files = {SETTINGS: json.dumps(settings, indent=2).encode()}
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _with_class(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The files of a tokenizer, naming a class if transformers would take the model's instead."""
    settings = parse(files, SETTINGS)
    model = parse({CONFIG: (folder / CONFIG).read_bytes()}, CONFIG)
    if settings.get("tokenizer_class") or model.get("model_type") not in CLASS_OF_MODEL:
        return files
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return files | {SETTINGS: json.dumps(settings, indent=2).encode()}


def hf_files(path: Path) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json`` of a SentencePiece byte-pair model.

    SentencePiece merges the neighbours whose union is the best piece, whatever they are: so every
    way to make a piece of two others is a merge, and pieces are in the order of their scores.
    Spaces are spaces here, so that the character that stands for them in a model is one like others
    where the model puts no space before a text.

    Args:
      path: of the ``.model`` file.
    """
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    names = [sp.id_to_piece(token) for token in range(sp.vocab_size())]
    kinds = (sp.is_control, sp.is_unknown, sp.is_byte, sp.is_unused)
    plain = [not any(is_kind(token) for is_kind in kinds) for token in range(len(names))]
    names = [n.replace(_SPACE, " ") if p else n for n, p in zip(names, plain, strict=True)]
    ranked = sorted((t for t in range(len(names)) if plain[t]), key=sp.get_score, reverse=True)
    merges = merges_of(names[token] for token in ranked)
    bos, eos, unknown = (names[i] for i in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: token for token, name in enumerate(names)},
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(sp.is_byte(token) for token in range(len(names))),
        )
    )
    parts = [decoders.ByteFallback(), decoders.Fuse()]
    if sp.id_to_piece(sp.encode("a")[0]).startswith(_SPACE):
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend(" "), normalizers.Replace(_SPACE, " ")]
        )
        parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(parts)
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, sp.bos_id())]
    )
    made.add_special_tokens([unknown, bos, eos])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
        # A text that holds "</s>" does not end there.
        "split_special_tokens": True,
    }
    return {MAIN: made.to_str().encode(), SETTINGS: json.dumps(settings, indent=2).encode()}
