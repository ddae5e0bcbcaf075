"""Tokens that end a text, as llama.cpp finds them in a GGUF file: by keys, and by their texts."""

from collections.abc import Callable
from typing import Any

_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ENDS = {
    "</s>", "<EOT>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "<turn|>", "<|call|>",
    "<|calls|>", "<|end_of_text|>", "<|end|>", "<|endoftext|>", "<|eom_id|>", "<|eot_id|>",
    "<|eot|>", "<|flush|>", "<|im_end|>", "<|return|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
    "[EOS]", "[EOT]", "[e~[", "_<EOT>",
}  # fmt: skip
_BY_TEXT = {
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}
"""Texts by which a token is found where its key is missing."""

_NO_END_BESIDE = (
    # A text may be made of several messages, each of them closed by this token.
    ("<|end|>", {"<|return|>", "<|flush|>"}, {"<|call|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}, {"<|tool_response>"}),
)
"""Texts that end nothing where one of each of the sets is there, too."""


def ends_in_gguf(metadata: Callable[[str], Any]) -> list[int]:
    """Tokens that end a text.

    Args:
      metadata: the value of a key, None where the file lacks it.
    """
    tokens = metadata("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    texts, found = set(_ENDS), set()
    for name in _KEYS:
        number = metadata(f"tokenizer.ggml.{name}_token_id")
        if type(number) is int and 0 <= number < len(tokens):
            found.add(number)
        else:
            texts |= _BY_TEXT.get(name, set())
    here = set(tokens)
    for text, *others in _NO_END_BESIDE:
        if all(here & other for other in others):
            texts.discard(text)
    return sorted(found | {number for number, text in enumerate(tokens) if text in texts})
