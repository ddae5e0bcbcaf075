"""Makers of small tokenizer folders in Hugging Face's format: contents of files by name."""

import copy
import functools
import io
import json

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = (
    "the cat and the other cat, 12 cats  is  it not so. It's \tdef f(x): return 12 == x ** 2\n" * 9
)
PROBES = (
    "the cat and the other cat",
    "  two  spaces\t\n and the end ",
    " <s>the</s> cat<|im_end|>it [X]cat [X] <unk>",
    "café ﬁx ÀÈ 数🙂 ▁the ▁",
    "IS it not so . do n't , it 's",
    "",
)
"""Texts of which ids are compared."""
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", **NAMED}

Files = dict[str, dict | bytes]


def write(folder, files: Files):
    """The folder, with the files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(content)
    return folder


def folder_of(main: dict, settings: dict | None = None, **files: dict) -> Files:
    """A folder of ``tokenizer.json``; further files by names without ``.json``."""
    found = {f"{name}.json": content for name, content in files.items()}
    found["tokenizer.json"] = main
    return found if settings is None else found | {"tokenizer_config.json": settings}


def changed(main: dict, **parts) -> dict:
    """A copy of a ``tokenizer.json`` with other parts; ``model_NAME`` is one of the model's."""
    main = copy.deepcopy(main)
    for name, value in parts.items():
        inner, _, rest = name.partition("_")
        if inner == "model":
            main["model"][rest] = value
        else:
            main[name] = value
    return main


def token(number: int, content: str, special: bool = True, **flags: bool) -> dict:
    """An entry of ``added_tokens``."""
    usual = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **usual, "special": special, **flags}


def template(before: str = "", after: str = "") -> dict:
    """A post-processor that puts tokens around a text."""
    around = [before] if before else []
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in around]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    single += [{"SpecialToken": {"id": t, "type_id": 0}} for t in [after] if t]
    ids = {"<s>": 0, "</s>": 1, "<t>": 2}
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (before, after) if t}
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }


@functools.cache
def byte_level() -> dict:
    """Byte-level byte-pair encoding of 300 tokens; the first two are ``<s>`` and ``</s>``."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return json.loads(made.to_str())


@functools.cache
def llama_like() -> dict:
    """Byte-pair encoding as Llama-2's ``tokenizer.json`` has it: byte fallback, "▁" for a space."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=tokens, show_progress=False)
    made.train_from_iterator([TEXT.replace("12", "")], trainer)
    main = json.loads(made.to_str())
    main["added_tokens"] = main["added_tokens"][:3]
    return main


@functools.cache
def unigram() -> dict:
    """Unigram with Metaspace, as T5's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60,
        special_tokens=["<s>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return json.loads(made.to_str())


@functools.cache
def sentencepiece_model(**settings) -> bytes:
    """A ``tokenizer.model``: ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2."""
    model = io.BytesIO()
    usual = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 300, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **{**usual, **settings}
    )
    return model.getvalue()
