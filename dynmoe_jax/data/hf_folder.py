"""A folder of Hugging Face's format, read as ``AutoTokenizer`` of transformers reads it.

What comes out are the files that a run keeps.  In them ``tokenizer.json`` alone says what the
tokenizer does, so that nobody need know of classes, of added tokens in other files, or of the
model that the folder belongs to.  Where it says so already, the files stay as they are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from dynmoe_jax.console import warn
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.hf_classes import CLASSES, build, class_of
from dynmoe_jax.data.hf_sentencepiece import Model, found_whole
from dynmoe_jax.data.hf_tokens import NAMED, Tokens, content_of, read_tokens

MAIN, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_ADDED, _MODEL = "added_tokens.json", "tokenizer.model"
_TRAVELING = ("chat_template.jinja", "generation_config.json")
FILES = (MAIN, SETTINGS, SPECIAL, _ADDED, "vocab.json", "merges.txt", _MODEL, *_TRAVELING)
"""What travels with a tokenizer, as far as it is there."""
_KEPT_SETTINGS = (
    "chat_template", "model_max_length", "padding_side", "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)  # fmt: skip


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a file that :func:`read_folder` can begin with."""
    return any((folder / name).is_file() for name in (MAIN, _MODEL))


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files that a run keeps of a folder, by name.

    Raises:
      DataError: it holds no tokenizer, or one that cannot be read as transformers reads it.
      OSError: a file cannot be read.
    """
    if not holds_tokenizer(folder):
        raise DataError(f"there is no {MAIN} and no {_MODEL}.")
    try:
        return _Reading(folder).kept_files()
    except (DataError, OSError):
        raise
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"its files cannot be read: {shortly(error)}.") from error


def read_kept(folder: Path) -> dict[str, bytes]:
    """The files that a run has kept, by name.

    Raises:
      DataError: there are none.
      OSError: a file cannot be read.
    """
    if not (folder / MAIN).is_file():
        raise DataError(f"there is no {MAIN}.")
    return _contents(folder)


class _Reading:
    """One folder.

    Args:
      folder: that holds a ``tokenizer.json`` or a ``tokenizer.model``.
    """

    def __init__(self, folder: Path):
        self._files = _contents(folder)
        self._settings = self._object(SETTINGS)
        self._main = self._object(MAIN)
        config = folder / "config.json"
        model = _parse(config.name, config.read_bytes()) if config.is_file() else {}
        is_byte_level = b'"ByteLevel"' in self._files.get(MAIN, b"")
        self._class = class_of(self._settings, model, is_byte_level)
        try:
            self._depends_on_model = class_of(self._settings, {}, is_byte_level) != self._class
        except DataError:
            self._depends_on_model = True

    def kept_files(self) -> dict[str, bytes]:
        made, tokens = self._from_model() if MAIN not in self._files else self._from_main()
        _check_ids(made, tokens, self._main)
        plain = self._files.get(MAIN) and tokenizers.Tokenizer.from_str(self._files[MAIN].decode())
        names = {name: content_of(tokens.named[name]) for name in NAMED if name in tokens.named}
        _name_beginning(made, names)
        if (
            plain
            and _essence(made) == _essence(plain)
            and self._plainly_named() == names
            and not self._depends_on_model
        ):
            return self._files
        settings = {n: self._settings[n] for n in _KEPT_SETTINGS if n in self._settings}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        kept = {name: self._files[name] for name in _TRAVELING if name in self._files}
        return kept | {MAIN: _written(made).encode(), SETTINGS: json.dumps(settings).encode()}

    def _from_main(self) -> tuple[tokenizers.Tokenizer, Tokens]:
        plain = tokenizers.Tokenizer.from_str(self._files[MAIN].decode())
        if self._class is None:
            tokens = self._tokens({})
            tokens.add_to(plain)
            return plain, tokens
        vocabulary, merges = _parts(self._main)
        made = build(self._class, vocabulary, merges, self._settings)
        if self._class != "GPTNeoXTokenizer":  # which forgets what stands around a text
            made.post_processor = plain.post_processor
        tokens = self._tokens(CLASSES[self._class].tokens)
        self._add(tokens, made)
        return made, tokens

    def _from_model(self) -> tuple[tokenizers.Tokenizer, Tokens]:
        model = Model(self._files[_MODEL])
        more = found_whole(model.control, special=True)
        if self._class == "LlamaTokenizer":
            tokens = self._tokens(
                CLASSES[self._class].tokens, more + found_whole(model.user_defined, special=False)
            )
            made = build(self._class, model.vocabulary, model.merges(), self._settings)
        elif self._class is None:
            tokens = self._tokens(model.tokens, more)
            renamed = {number: token.content for number, token in tokens.added.items()}
            made = model.tokenizer(renamed, legacy=bool(self._settings.get("legacy", True)))
            if model.puts_space_before:
                tokens.find_whole()
        else:
            raise DataError(
                f"a {self._class} has no {_MODEL}; name LlamaTokenizer or PreTrainedTokenizerFast "
                f"as tokenizer_class in {SETTINGS}."
            )
        self._add(tokens, made)
        _put_around(made, tokens, self._settings)
        return made, tokens

    def _tokens(self, usual: Mapping[str, Any], more: list[AddedToken] | None = None) -> Tokens:
        special, added = self._object(SPECIAL), self._object(_ADDED)
        return read_tokens(self._settings, special, added, self._main, usual, more)

    def _add(self, tokens: Tokens, made: tokenizers.Tokenizer) -> None:
        tokens.add_to(made)
        if self._class == "Qwen2Tokenizer":
            names = map(content_of, (*tokens.named.values(), *tokens.more))
            made.add_tokens([AddedToken(name, special=True) for name in names])

    def _plainly_named(self) -> dict[str, str]:
        """Named tokens as they are read from kept files."""
        return named_tokens(self._object(SPECIAL) | self._settings)

    def _object(self, name: str) -> dict[str, Any]:
        return _parse(name, self._files[name]) if name in self._files else {}


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the tokens that settings name, by name."""
    found = {name: settings.get(name) for name in NAMED}
    found = {n: t.get("content") if isinstance(t, dict) else t for n, t in found.items()}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer puts before and after a text."""
    probes = ("a", *tokenizer.get_vocab(with_added_tokens=False))
    for probe in probes:
        inside = tokenizer.encode(probe, add_special_tokens=False).ids
        if inside:
            break
    else:
        return [], []
    encoded = tokenizer.encode(probe)
    first = encoded.sequence_ids.index(0)
    return encoded.ids[:first], encoded.ids[first + len(inside) :]


def _name_beginning(made: tokenizers.Tokenizer, names: dict[str, str]) -> None:
    """Names the token that is put before a text, if no setting does; checks what is put around.

    Raises:
      DataError: it is more than the tokens that begin and end a document.
    """
    before, after = around(made)
    if len(before) == 1:
        names.setdefault("bos_token", made.id_to_token(before[0]))
    begins = [made.token_to_id(names["bos_token"])] if "bos_token" in names else []
    ends = [made.token_to_id(names["eos_token"])] if "eos_token" in names else []
    if before not in ([], begins) or after not in ([], ends):
        put = [*map(made.id_to_token, before), "the text", *map(made.id_to_token, after)]
        raise DataError(
            f"its post-processor makes a text to {' '.join(put)}; at most bos_token before and "
            "eos_token after it can be put here."
        )


def _put_around(made: tokenizers.Tokenizer, tokens: Tokens, settings: Mapping[str, Any]) -> None:
    """Has BOS and EOS put around a text, as settings ask."""
    names = {}
    for name in ("bos_token", "eos_token"):
        if settings.get(f"add_{name}") and name in tokens.named:
            names[name] = content_of(tokens.named[name])
    single = [names.get("bos_token"), "$A", names.get("eos_token")]
    made.post_processor = processors.TemplateProcessing(
        single=[part for part in single if part],
        pair=None,
        special_tokens=[(text, made.token_to_id(text)) for text in names.values()],
    )


def _parts(main: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a ``tokenizer.json``."""
    model = main.get("model") or {}
    vocabulary, merges = model.get("vocab"), model.get("merges") or []
    if isinstance(vocabulary, list):
        texts = [entry[0] if isinstance(entry, list) else entry for entry in vocabulary]
        vocabulary = {text: number for number, text in enumerate(texts)}
    return vocabulary, [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]


def _check_ids(made: tokenizers.Tokenizer, tokens: Tokens, main: Mapping[str, Any]) -> None:
    """Says it if a token has another id than the files give it."""
    asked = {token.content: number for number, token in tokens.added.items()}
    asked |= {entry["content"]: entry["id"] for entry in main.get("added_tokens") or []}
    moved = {
        text: (number, made.token_to_id(text))
        for text, number in asked.items()
        if made.token_to_id(text) not in (None, number)
    }
    for text, (number, now) in list(moved.items())[:1]:
        warn(
            f"The files of the tokenizer give {text!r} the id {number}, but it is read as {now}, as "
            f"in transformers: added tokens follow the vocabulary without a gap ({len(moved)} so)."
        )


def _written(made: tokenizers.Tokenizer) -> str:
    """A ``tokenizer.json`` that is read with the same ids.

    Raises:
      DataError: there is none.
    """
    text, ids = made.to_str(), made.get_vocab(with_added_tokens=True)
    if tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True) == ids:
        return text
    # Added tokens get the next id when they are read, unless the vocabulary has them.
    main = json.loads(text)
    if isinstance(main["model"]["vocab"], dict):
        main["model"]["vocab"] = ids
        text = json.dumps(main)
        if tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True) == ids:
            return text
    raise DataError("the ids of its added tokens cannot be kept.")


def _essence(tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """What a tokenizer does, without what is no part of it, or is written in two ways."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {n: simple(v) for n, v in value.items() if n != "trim_offsets"}
        return [simple(v) for v in value] if isinstance(value, list) else value

    found = json.loads(tokenizer.to_str())
    model = {name: value or None for name, value in found.pop("model").items()}
    for name in ("truncation", "padding"):
        found.pop(name)
    return simple(found) | {"model": model}


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as JSON ({shortly(error)}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} must hold a JSON object.")
    return value


def shortly(error: BaseException) -> str:
    """The first line of an error's message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
