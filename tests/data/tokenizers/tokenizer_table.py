"""A table of small tokenizer folders, by what is special about each."""

from tests.data.tokenizers.tokenizer_folders import (
    FAST,
    LLAMA,
    NAMED,
    byte_level,
    changed,
    folder_of,
    llama_like,
    sentencepiece_model,
    template,
    token,
    unigram,
)

TABLE = {}


def case(name, files):
    assert name not in TABLE
    TABLE[name] = files


def added_to(main, *tokens):
    return changed(main, added_tokens=main["added_tokens"] + list(tokens))


def described(**tokens):
    """``added_tokens_decoder`` of ``_NUMBER=(content, special)``."""
    entries = {name[1:]: token(0, *value) for name, value in tokens.items()}
    for entry in entries.values():
        del entry["id"]
    return {"added_tokens_decoder": entries}


# What stands around a text.
AROUND = {
    "no template": None,
    "bos": template("<s>"),
    "eos": template("", "</s>"),
    "bos and eos": template("<s>", "</s>"),
    "byte level": {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    },
}
AROUND["sequence"] = {"type": "Sequence", "processors": [AROUND["byte level"], AROUND["bos"]]}
for name, post in AROUND.items():
    case(f"byte level, {name}", folder_of(changed(byte_level(), post_processor=post), FAST))
    for flag in ("add_bos_token", "add_eos_token"):
        for value in (True, False):
            for settings in (FAST, LLAMA) if name in ("no template", "bos and eos") else (FAST,):
                case(
                    f"byte level, {name}, {flag}={value}, {settings['tokenizer_class']}",
                    folder_of(changed(byte_level(), post_processor=post), settings | {flag: value}),
                )
case("only tokenizer.json's class", folder_of(byte_level(), NAMED))
case("no settings but a map", folder_of(byte_level(), special_tokens_map=NAMED))

# Added and special tokens, in each of the files that may hold them.
MORE = added_to(byte_level(), token(300, "[X]", special=False), token(301, "<|im_end|>"))
IM_END = FAST | {"eos_token": "<|im_end|>"}
case("added, in tokenizer.json", folder_of(MORE, FAST))
for flag in ("single_word", "lstrip", "rstrip", "normalized"):
    main = added_to(byte_level(), token(300, "[X]", special=False, **{flag: True}))
    case(f"added, {flag}", folder_of(main, FAST))
case("added, EOS among them", folder_of(MORE, IM_END))
case("described, as added", folder_of(MORE, FAST | described(_300=("[X]", False))))
case("described, EOS alone", folder_of(byte_level(), IM_END | described(_300=("<|im_end|>", True))))
case("described otherwise than added", folder_of(MORE, FAST | described(_300=("[X]", True))))
case(
    "described with another id",
    folder_of(byte_level(), FAST | described(_310=("[X]", False), _305=("<|im_end|>", True))),
)
case(
    "described, no token of the model",
    folder_of(byte_level(), FAST | described(_263=("the", False))),
)
case("added_tokens.json", folder_of(byte_level(), IM_END, added_tokens={"<|im_end|>": 300}))
case(
    "added_tokens.json, out of order",
    folder_of(byte_level(), FAST, added_tokens={"[X]": 301, "<|im_end|>": 300}),
)
case(
    "added_tokens.json is not read beside a description",
    folder_of(MORE, FAST | described(_300=("[X]", False)), added_tokens={"<|im_start|>": 302}),
)
case("map, strings", folder_of(MORE, FAST, special_tokens_map={"eos_token": "<|im_end|>"}))
case(
    "map, tokens",
    folder_of(
        MORE,
        FAST,
        special_tokens_map={
            "eos_token": {"content": "<|im_end|>", "lstrip": True, "rstrip": False}
        },
    ),
)
case(
    "map is not read beside a description",
    folder_of(
        MORE,
        FAST | described(_300=("[X]", False)),
        special_tokens_map={"eos_token": "<|im_end|>"},
    ),
)
case("map, null for BOS", folder_of(MORE, FAST, special_tokens_map={"bos_token": None}))
for name in ("additional_special_tokens", "extra_special_tokens"):
    case(f"settings, {name}", folder_of(MORE, FAST | {name: ["[X]", "<new>"]}))
    case(f"map, {name}", folder_of(MORE, FAST, special_tokens_map={name: ["[X]", "<new>"]}))
    case(f"settings, {name} null", folder_of(MORE, FAST | {name: None}))
case("extra tokens with names", folder_of(MORE, FAST | {"extra_special_tokens": {"im": "[X]"}}))
case("a token of another name", folder_of(MORE, FAST | {"image_token": "<image>"}))
case(
    "a token as transformers 4 wrote it",
    folder_of(MORE, FAST | {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}),
)
case("EOS that is no token yet", folder_of(byte_level(), FAST | {"eos_token": "<end>"}))
case("padding that is no token yet", folder_of(byte_level(), FAST | {"pad_token": "[PAD]"}))
case("unknown and padding", folder_of(MORE, FAST | {"unk_token": "<s>", "pad_token": "[X]"}))
case("special tokens are text", folder_of(MORE, FAST | {"split_special_tokens": True}))
case("no BOS", folder_of(byte_level(), {**FAST, "bos_token": None}))

# Gaps between ids, merges, null entries, normalizers.
GAPS = changed(
    byte_level(),
    model_vocab={
        text: {0: 400, 1: 420}.get(number, number)
        for text, number in byte_level()["model"]["vocab"].items()
    },
    added_tokens=[token(400, "<s>"), token(420, "</s>")],
)
case("ids with gaps", folder_of(GAPS, FAST))
case("ids with gaps, one more", folder_of(GAPS, FAST | {"pad_token": "[PAD]"}))
case("ids with gaps, added before", folder_of(added_to(GAPS, token(298, "[X]")), FAST))
SHORT = {**byte_level()["model"]["vocab"], "Ġspaces": 300}
for value in (True, False):
    main = changed(byte_level(), model_vocab=SHORT, model_ignore_merges=value)
    case(f"ignore_merges={value}", folder_of(main, FAST))
NULLS = dict.fromkeys(
    ("pad_token", "unk_token", "tokenizer_class", "chat_template", "additional_special_tokens",
     "model_max_length", "add_prefix_space", "add_bos_token", "legacy")
)  # fmt: skip
case("null entries", folder_of(byte_level(), NAMED | NULLS))
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "_"}
NORMALIZERS = {
    "NFC": {"type": "NFC"},
    "lower case": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
    "strip": {"type": "Strip", "strip_left": True, "strip_right": True},
    "replace": REPLACE,
    "prepend": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, REPLACE]},
}
for name, normalizer in NORMALIZERS.items():
    case(f"normalizer, {name}", folder_of(changed(byte_level(), normalizer=normalizer), FAST))
    main = added_to(
        changed(byte_level(), normalizer=normalizer), token(300, "[X]", normalized=True)
    )
    case(f"normalizer, {name}, added", folder_of(main, FAST))

# As SentencePiece's.
UNK = {"unk_token": "<unk>"}
case("Llama-like", folder_of(llama_like(), FAST | UNK))
case(
    "Llama-like, with BOS", folder_of(changed(llama_like(), post_processor=template("<s>")), LLAMA)
)
for name, more in {
    "": {},
    ", legacy": {"legacy": True},
    ", not legacy": {"legacy": False},
    ", legacy null": {"legacy": None},
    ", no space before": {"add_prefix_space": False},
    ", adds BOS": {"add_bos_token": True},
    ", adds no BOS": {"add_bos_token": False},
    ", described": described(_0=("<s>", True), _1=("</s>", True), _2=("<unk>", True)),
    ", another EOS": {"eos_token": "<|im_end|>"} | described(_340=("<|im_end|>", True)),
}.items():
    case(f"Llama-like, its class{name}", folder_of(llama_like(), LLAMA | UNK | more))
case("Llama-like, as Gemma", folder_of(llama_like(), FAST | {"tokenizer_class": "GemmaTokenizer"}))
case("unigram", folder_of(unigram(), FAST | UNK))
case("unigram, cleaned", folder_of(unigram(), FAST | {"clean_up_tokenization_spaces": True}))
case("unigram, with BOS", folder_of(changed(unigram(), post_processor=template("<s>")), FAST))

# Classes that build their own from the vocabulary and the merges; models that have a class.
for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizerFast"):
    case(f"byte level, {name}", folder_of(byte_level(), FAST | {"tokenizer_class": name}))
    main = changed(
        MORE,
        normalizer=NORMALIZERS["lower case"],
        model_unk_token="a",
        post_processor=template("<s>"),
    )
    settings = FAST | {
        "tokenizer_class": name,
        "add_prefix_space": True,
        "pad_token": "<|endoftext|>",
    }
    case(f"byte level, {name}, other parts", folder_of(main, settings))
    case(
        f"byte level, {name}, described",
        folder_of(main, settings | described(_300=("[X]", False), _301=("<|im_end|>", True))),
    )
for model_type in ("llama", "mixtral", "olmoe", "qwen2_moe", "mistral", "qwen2", "gpt2", "unknown"):
    model = {"model_type": model_type}
    case(f"{model_type}, no class", folder_of(byte_level(), NAMED, config=model))
    case(f"{model_type}, Llama's class", folder_of(llama_like(), LLAMA | UNK, config=model))
    case(
        f"{model_type}, Qwen's class",
        folder_of(MORE, FAST | {"tokenizer_class": "Qwen2Tokenizer"}, config=model),
    )
case(
    "the class of config.json",
    folder_of(
        llama_like(), NAMED, config={"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}
    ),
)

# ``tokenizer.model`` alone, with and without files beside it.
LLAMA_2 = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OURS = LLAMA_2 | {"add_dummy_prefix": False, "split_by_whitespace": False}
OURS["allow_whitespace_only_pieces"] = True
MODELS = {
    "llama": sentencepiece_model(**LLAMA_2),
    "ours": sentencepiece_model(**OURS),
    "defaults": sentencepiece_model(),
    "unigram": sentencepiece_model(model_type="unigram", hard_vocab_limit=False),
    "symbols": sentencepiece_model(user_defined_symbols="[X],<sep>", **LLAMA_2),
    "control": sentencepiece_model(control_symbols="<|im_end|>", **LLAMA_2),
}
CHAT = {"<|im_end|>": 300, "<|im_start|>": 301}
for name, model in MODELS.items():
    beside = {"tokenizer.model": model}
    case(f"SentencePiece, {name}", beside)
    case(f"SentencePiece, {name}, named", beside | {"tokenizer_config.json": dict(FAST)})
    if name != "unigram":
        case(
            f"SentencePiece, {name}, Llama's class", beside | {"tokenizer_config.json": dict(LLAMA)}
        )
LLAMA_MODEL = {"tokenizer.model": MODELS["llama"]}
for settings in (LLAMA, FAST, NAMED):
    kind = settings.get("tokenizer_class")
    for more in (
        {"add_bos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True, "legacy": True},
        {"legacy": False},
        {"bos_token": None},
        {"eos_token": "<|im_end|>"},
        {"additional_special_tokens": ["<new>"]},
        described(
            _0=("<unk>", True), _1=("<s>", True), _2=("</s>", True), _300=("<|im_end|>", True)
        ),
    ):
        what = ", ".join(f"{name}={value}" for name, value in more.items())[:60]
        case(
            f"SentencePiece, {kind}, {what}",
            LLAMA_MODEL | {"tokenizer_config.json": settings | more},
        )
    case(
        f"SentencePiece, {kind}, added_tokens.json",
        LLAMA_MODEL
        | {
            "tokenizer_config.json": settings | {"eos_token": "<|im_end|>"},
            "added_tokens.json": CHAT,
        },
    )
    case(
        f"SentencePiece, {kind}, map",
        LLAMA_MODEL
        | {
            "tokenizer_config.json": settings,
            "added_tokens.json": CHAT,
            "special_tokens_map.json": {
                "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False}
            },
        },
    )
