"""The tokenizer of a GGUF file, as one of Hugging Face's format."""

import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from dynmoe_jax.data.hf_tokenizer import MAIN, SETTINGS, HfTokenizer
from dynmoe_jax.interop.errors import CheckpointError

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens that are found in a text before it is cut."""


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTTERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _smollm,
    "llama-bpe": lambda: _by_pattern(_LETTERS + r"\p{N}{1,3}" + _REST),
    "qwen2": lambda: _by_pattern(_LETTERS + r"\p{N}" + _REST),
}
"""How a text is cut before merging, by the name that llama.cpp gives to it."""


def tokenizer_of(metadata: Callable[[str], Any]) -> HfTokenizer | None:
    """The tokenizer that a file's metadata describes; None if there is none.

    Args:
      metadata: the value of a key, None where it is missing.

    Raises:
      CheckpointError: it is no byte-level byte-pair tokenizer, or cuts text in an unknown way.
    """
    kind, cutter = metadata("tokenizer.ggml.model"), metadata("tokenizer.ggml.pre") or "gpt-2"
    if kind is None:
        return None
    if kind != "gpt2" or cutter not in CUTTERS:
        raise CheckpointError(
            f"the GGUF file has a tokenizer of kind {kind!r}, {cutter!r}; 'gpt2' with "
            f"{', '.join(map(repr, CUTTERS))} can be read."
        )
    tokens = metadata("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = CUTTERS[cutter]()
    made.decoder = decoders.ByteLevel()
    for number, what in enumerate(metadata("tokenizer.ggml.token_type") or []):
        if what in (_CONTROL, _USER_DEFINED):
            control = what == _CONTROL
            made.add_tokens([AddedToken(tokens[number], special=control, normalized=False)])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    if metadata("tokenizer.chat_template"):
        settings["chat_template"] = metadata("tokenizer.chat_template")
    return HfTokenizer({MAIN: made.to_str().encode(), SETTINGS: json.dumps(settings).encode()})
