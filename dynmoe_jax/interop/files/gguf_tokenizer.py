"""The tokenizer of a GGUF file, as one of Hugging Face's format that does what llama.cpp does."""

import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from dynmoe_jax.data import DataError
from dynmoe_jax.data.tokenizers.hf import HfTokenizer
from dynmoe_jax.data.tokenizers.hf_around import put_around
from dynmoe_jax.data.tokenizers.hf_files import MAIN, SETTINGS
from dynmoe_jax.interop.files.gguf_vocabulary import CONTROL, USER_DEFINED, GgufVocabulary
from dynmoe_jax.runs.errors import CheckpointError


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
"""Pre-tokenizers that cut a text before merging, by the name that llama.cpp gives to each."""
_LIKE_LLAMA_3 = ("llama-bpe",)
"""Pre-tokenizers for which llama.cpp puts BOS before a text if no key says otherwise, and takes a
stretch that is a token as it is, without merging."""


def tokenizer_of(metadata: Callable[[str], Any]) -> HfTokenizer | None:
    """The tokenizer that a file's metadata describes; None if there is none.

    Args:
      metadata: the value of a key, None where it is missing.

    Raises:
      CheckpointError: it is no byte-level byte-pair tokenizer, cuts text in an unknown way, or its
        keys contradict each other.
    """
    keys = GgufVocabulary(metadata)
    kind, cutter = keys.value("model", str), keys.value("pre", str)
    if kind is None:
        return None
    cutter = "gpt-2" if cutter is None else cutter
    if kind != "gpt2" or cutter not in CUTTERS:
        raise CheckpointError(
            f"the GGUF file has a tokenizer of kind {kind!r}, {cutter!r}; 'gpt2' with "
            f"{', '.join(map(repr, CUTTERS))} can be read."
        )
    model = models.BPE(
        vocab={token: number for number, token in enumerate(keys.tokens)},
        merges=keys.merges,
        ignore_merges=cutter in _LIKE_LLAMA_3,
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = CUTTERS[cutter]()
    made.decoder = decoders.ByteLevel()
    kinds = zip(keys.tokens, keys.token_types, strict=False)
    whole = [token for token, kind in kinds if kind in (CONTROL, USER_DEFINED)]
    made.add_tokens([AddedToken(t, special=t in keys.control, normalized=False) for t in whole])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            f"{name}_token": token
            for name, token in keys.named.items()
            # Files name tokens of text as unknown or padding, which must not vanish from texts.
            if name in ("bos", "eos") or token in keys.control
        },
    }
    if template := metadata("tokenizer.chat_template"):
        settings["chat_template"] = template
    put_around(made, *keys.around(begins=cutter in _LIKE_LLAMA_3))
    try:
        return HfTokenizer({MAIN: made.to_str().encode(), SETTINGS: json.dumps(settings).encode()})
    except DataError as error:
        raise CheckpointError(f"the tokenizer of the GGUF file cannot be read: {error}") from error
