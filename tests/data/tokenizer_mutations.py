"""Tokenizer folders with one to three things changed in them, by a seed."""

import copy
import json
import random

from tests.data.tokenizers.tokenizer_table import TABLE

_BASES = (
    "byte level, bos and eos, add_bos_token=False, LlamaTokenizerFast",
    "byte level, sequence",
    "added, in tokenizer.json",
    "described with another id",
    "added_tokens.json, out of order",
    "map, tokens",
    "map, extra_special_tokens",
    "ids with gaps, one more",
    "normalizer, lower case, added",
    "Llama-like, its class, described",
    "unigram, with BOS",
    "byte level, Qwen2Tokenizer, other parts",
    "olmoe, no class",
    "SentencePiece, symbols, named",
    "SentencePiece, LlamaTokenizerFast, added_tokens.json",
    "SentencePiece, PreTrainedTokenizerFast, map",
)
_VALUES = (
    None, True, False, 0, 1, -1, 300, 301, 2**31, 2**40, 0.5, "", "a", "<s>", "</s>", "[X]", "\n",
    "<|im_end|>", "\ud800", "é", "PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer",
    [], {}, ["<s>"], ["a", "b"], {"content": "<s>"}, {"type": "ByteLevel"}, [[]], [None],
    {"__type": "AddedToken", "content": "[X]", "lstrip": True},
)  # fmt: skip
_NAMES = (
    "add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token",
    "additional_special_tokens", "extra_special_tokens", "image_token", "added_tokens_decoder",
    "tokenizer_class", "legacy", "add_prefix_space", "split_special_tokens", "model_type",
    "clean_up_tokenization_spaces", "chat_template", "padding", "truncation", "normalizer",
    "content", "id", "special", "normalized", "byte_fallback", "ignore_merges", "fuse_unk", "vocab",
    "merges",
)  # fmt: skip
_FILES = {
    "added_tokens.json": {"<|im_end|>": 300, "<new>": 301},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["[X]"]},
    "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "</s>"},
    "config.json": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
}


def mutated(seed: int) -> dict[str, bytes]:
    """A folder: contents of files by name."""
    draw = random.Random(seed)
    files = copy.deepcopy(TABLE[draw.choice(_BASES)])
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.choices(("json", "bytes", "more", "less"), (14, 1, 2, 1))[0]
        # In other files fewer changes end in what no library reads.
        names = sorted(files) + 2 * sorted(files.keys() - {"tokenizer.json", "tokenizer.model"})
        name = draw.choice(names)
        if kind == "more":
            name = draw.choice(sorted(_FILES))
            files[name] = copy.deepcopy(_FILES[name])
        elif kind == "less" and len(files) > 1:
            del files[name]
        elif isinstance(files[name], bytes) or kind == "bytes":
            files[name] = _other_bytes(draw, _encoded(files[name]))
        else:
            _change(draw, files[name])
    return {name: _encoded(content) for name, content in files.items()}


def _change(draw: random.Random, value: dict | list) -> None:
    """Changes something in a JSON object or list, not always deep inside."""
    while True:
        places = [*value] if isinstance(value, dict) else [*range(len(value))]
        inner = [place for place in places if isinstance(value[place], dict | list)]
        if not inner or draw.random() < 0.3:
            break
        value = value[draw.choice(inner)]
    place = draw.choice(places) if places else None
    what = draw.choice(("delete", "set", "set", "add", "copy", "rename"))
    if what == "add" or place is None:
        if isinstance(value, dict):
            value[draw.choice(_NAMES)] = copy.deepcopy(draw.choice(_VALUES))
        else:
            value.append(copy.deepcopy(draw.choice(_VALUES)))
    elif what == "delete":
        del value[place]
    elif what == "set":
        value[place] = copy.deepcopy(draw.choice(_VALUES))
    elif what == "copy":
        value[place] = copy.deepcopy(value[draw.choice(places)])
    elif isinstance(value, dict):
        value[draw.choice(_NAMES)] = value.pop(place)
    else:
        draw.shuffle(value)


def _other_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return draw.choice(
        (
            content[:at],
            content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            content[:at] + draw.randbytes(3) + content[at:],
            content[:at] + content[at + 5 :],
            b"\xef\xbb\xbf" + content,
            b"",
            draw.randbytes(40),
            content.replace(b"</s>", b"</s\xff"),
        )
    )


def _encoded(content: dict | bytes) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()
