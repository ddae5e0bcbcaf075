"""Classes of tokenizers, and what each makes of ``tokenizer.json``.

``AutoTokenizer`` takes most files as they stand.  Some classes take the vocabulary, the merges and
the post-processor alone, and bring everything else along.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.hf_tokens import Token

_SPACE = "▁"
_END = "<|endoftext|>"
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Class(NamedTuple):
    """A class that brings its own parts along.

    Attributes:
      complete: gives a bare tokenizer its parts, by the settings of ``tokenizer_config.json``.
      bpe: what its byte-pair model is made with, besides vocabulary and merges.
      tokens: its named tokens where the settings are silent.
    """

    complete: Callable[[Tokenizer, Mapping[str, Any]], None]
    bpe: Mapping[str, Any]
    tokens: Mapping[str, Token]


def _llama(made: Tokenizer, settings: Mapping[str, Any]) -> None:
    asked = settings.get("add_prefix_space")
    prefixed = asked is None or bool(asked)
    scheme = "always" if settings.get("legacy") else "first"
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        _SPACE, prepend_scheme=scheme if prefixed else "never", split=False
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefixed)


def _gemma(made: Tokenizer, settings: Mapping[str, Any]) -> None:
    del settings
    made.normalizer = normalizers.Replace(" ", _SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def _gpt2(made: Tokenizer, settings: Mapping[str, Any]) -> None:
    made.pre_tokenizer = _byte_level(settings)
    made.decoder = decoders.ByteLevel()


def _gpt_neox(made: Tokenizer, settings: Mapping[str, Any]) -> None:
    _gpt2(made, settings)
    made.normalizer = normalizers.NFC()


def _qwen2(made: Tokenizer, settings: Mapping[str, Any]) -> None:
    _gpt_neox(made, settings)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated"),
            _byte_level(settings, use_regex=False),
        ]
    )


def _byte_level(settings: Mapping[str, Any], **more: bool) -> pre_tokenizers.PreTokenizer:
    prefixed = bool(settings.get("add_prefix_space"))
    return pre_tokenizers.ByteLevel(add_prefix_space=prefixed, **more)


_UNFUSED = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
_FALLBACK = {"fuse_unk": True, "byte_fallback": True}
_ENDS = {"unk_token": _END, "bos_token": _END, "eos_token": _END}
_GEMMA_TOKENS = {
    "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip
CLASSES = {
    "LlamaTokenizer": Class(
        _llama, _FALLBACK, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ),
    "GemmaTokenizer": Class(_gemma, _FALLBACK | {"unk_token": "<unk>"}, _GEMMA_TOKENS),
    "GPT2Tokenizer": Class(_gpt2, _UNFUSED, _ENDS),
    "GPTNeoXTokenizer": Class(_gpt_neox, _UNFUSED, _ENDS | {"pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": Class(
        _qwen2, _UNFUSED, {"unk_token": _END, "eos_token": _END, "pad_token": _END}
    ),
}
_AS_IT_STANDS = (
    "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "BloomTokenizer", None
)  # fmt: skip
# Kinds of models by config.json: those whose tokenizers are read as they stand, whatever class they
# name, and the class of those that name none.
PLAIN_MODELS = (
    "mixtral", "mistral", "mistral3", "ministral", "ministral3", "glm", "glm4", "glm4_moe",
    "gpt_bigcode", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "flex_olmo",
    "olmo2", "olmo3", "stablelm", "persimmon", "phi3", "phimoe", "nemotron", "jamba", "internlm2",
    "internlm3", "minicpm3", "arctic", "ernie4_5", "ernie4_5_moe", "minimax_m2", "kimi_linear",
)  # fmt: skip
CLASS_OF_MODEL = {
    "gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "gptj": "GPT2Tokenizer",
    "opt": "GPT2Tokenizer", "phi": "GPT2Tokenizer", "starcoder2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer", "olmo": "GPTNeoXTokenizer", "olmoe": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer", "gemma3_text": "GemmaTokenizer",
}  # fmt: skip
_ALWAYS_ITS_OWN = ("qwen2",)
"""Models of which a class that the settings name is known to be wrong."""


def class_of(settings: Mapping[str, Any], model: Mapping[str, Any], byte_level: bool) -> str | None:
    """The name of the class that reads a folder; None if the files are taken as they stand.

    Args:
      settings: what ``tokenizer_config.json`` holds.
      model: what ``config.json`` holds.
      byte_level: whether ``tokenizer.json`` has a part that is byte-level.

    Raises:
      DataError: what the class does is not known here.
    """
    if settings.get("auto_map"):
        raise DataError(
            "tokenizer_config.json has an auto_map to code of its own, which is not run here; take "
            "it out to have tokenizer.json read as it stands."
        )
    asked = settings.get("tokenizer_class") or model.get("tokenizer_class")
    asked = None if asked is None else str(asked).removesuffix("Fast")
    kind = str(model.get("model_type"))
    if kind in PLAIN_MODELS or (asked == "LlamaTokenizer" and byte_level and kind != "qwen2"):
        return None
    usual = CLASS_OF_MODEL.get(kind)
    if usual and (asked is None or kind in _ALWAYS_ITS_OWN):
        return usual
    if asked in _AS_IT_STANDS:
        return None
    if asked not in CLASSES:
        raise DataError(
            f"what the tokenizer_class {asked!r} of tokenizer_config.json does is not known here; "
            "PreTrainedTokenizerFast there has tokenizer.json read as it stands."
        )
    return asked


def build(
    name: str, vocabulary: dict[str, int], merges: list[tuple[str, str]], settings: Mapping
) -> Tokenizer:
    """A tokenizer of a class that brings its own parts along.

    Args:
      name: one of :data:`CLASSES`.
      vocabulary: ids of tokens.
      merges: pairs of tokens.
      settings: what ``tokenizer_config.json`` holds.

    Raises:
      Exception: the vocabulary lacks what the merges name.
    """
    kind = CLASSES[name]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **kind.bpe))
    kind.complete(made, settings)
    return made
