"""A folder of Hugging Face's format, read as ``AutoTokenizer`` of transformers 5 reads it.

The result are the files that a run keeps.  Their ``tokenizer.json`` alone decides about ids:
classes, added tokens in other files and the model that the folder belongs to are resolved here,
once.  Where nothing is to be resolved, the files stay as they are.
"""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dynmoe_jax.console import warn
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.tokenizers.hf_around import around, check_around, put_around
from dynmoe_jax.data.tokenizers.hf_classes import CLASSES, build, class_of
from dynmoe_jax.data.tokenizers.hf_files import (
    ADDED,
    CONFIG,
    MAIN,
    MODEL,
    SETTINGS,
    TRAVELING,
    contents,
    library_errors,
    parse,
)
from dynmoe_jax.data.tokenizers.hf_plain import FLAGS, names_of, plain_tokenizer, tokens_of
from dynmoe_jax.data.tokenizers.hf_sentencepiece import Model, found_whole
from dynmoe_jax.data.tokenizers.hf_tokens import Tokens, content_of

_ENDS = ("bos_token", "eos_token")
_KEPT_SETTINGS = (
    "chat_template", "model_max_length", "padding_side", "split_special_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
)  # fmt: skip


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files that a run keeps of a folder, by name.

    Args:
      folder: one that :func:`holds_tokenizer`.

    Raises:
      DataError: it cannot be read as transformers reads it.
      OSError: a file cannot be read.
    """
    with library_errors("its files cannot be read"):
        return _Reading(folder).kept_files()


class _Reading:
    """One folder.

    Args:
      folder: that holds a ``tokenizer.json`` or a ``tokenizer.model``.
    """

    def __init__(self, folder: Path):
        self._files = contents(folder)
        self._settings = parse(self._files, SETTINGS)
        self._main = parse(self._files, MAIN) if MAIN in self._files else None
        config = folder / CONFIG
        model = parse({CONFIG: config.read_bytes()}, CONFIG) if config.is_file() else {}
        is_byte_level = b'"ByteLevel"' in self._files.get(MAIN, b"")
        self._class = class_of(self._settings, model, is_byte_level)
        try:
            without = class_of(self._settings, {}, is_byte_level)
        except DataError:
            without = ""
        self._depends_on_model = without != self._class

    def kept_files(self) -> dict[str, bytes]:
        """The files that a run keeps, by name."""
        made, tokens = self._from_model() if self._main is None else self._from_main()
        if getattr(made.model, "dropout", None):
            raise DataError("its model leaves out merges at random (dropout).")
        _check_ids(made, tokens, self._main or {})
        names = names_of(tokens)
        for name in _ENDS:
            if name in names and made.token_to_id(names[name]) is None:
                raise DataError(f"{name}={names[name]!r} is no token.")
        before, after = around(made)
        if len(before) == 1:
            names.setdefault("bos_token", made.id_to_token(before[0]))
        check_around(made, names, before, after)
        self._compare_flag(bool(before))
        if self._main is not None and self._stays(made, tokens, names):
            return self._files
        settings = {n: self._settings[n] for n in _KEPT_SETTINGS if n in self._settings}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        kept = {name: self._files[name] for name in TRAVELING if name in self._files}
        return kept | {MAIN: _written(made).encode(), SETTINGS: json.dumps(settings).encode()}

    def _stays(self, made: tokenizers.Tokenizer, tokens: Tokens, names: Mapping[str, str]) -> bool:
        """Whether the files, as they are, decide alone, whatever class reads them."""
        plain = made
        if self._class is not None or ADDED in self._files:
            # A run knows its tokenizer by a digest without that of added_tokens.json.
            files = {name: content for name, content in self._files.items() if name != ADDED}
            plain, tokens = plain_tokenizer(files)
        others = names_of(tokens)
        return (
            not self._depends_on_model
            and all(names.get(name) == others.get(name) for name in _ENDS)
            and (plain is made or _essence(made) == _essence(plain))
        )

    def _from_main(self) -> tuple[tokenizers.Tokenizer, Tokens]:
        plain, tokens = plain_tokenizer(self._files)
        if self._class is None:
            return plain, tokens
        vocabulary, merges = _parts(self._main or {})
        made = build(self._class, vocabulary, merges, self._settings)
        if self._class != "GPTNeoXTokenizer":  # which forgets what stands around a text
            made.post_processor = plain.post_processor
        tokens = tokens_of(self._files, CLASSES[self._class].tokens, main=self._main or {})
        self._add(tokens, made)
        return made, tokens

    def _from_model(self) -> tuple[tokenizers.Tokenizer, Tokens]:
        model = Model(self._files[MODEL])
        control = found_whole(model.control, special=True)
        if self._class == "LlamaTokenizer":
            more = control + found_whole(model.user_defined, special=False)
            tokens = tokens_of(self._files, CLASSES[self._class].tokens, more, main={})
            made = build(self._class, model.vocabulary, model.merges(), self._settings)
        elif self._class is None:
            tokens = tokens_of(self._files, model.tokens, control, main={})
            renamed = {number: token.content for number, token in tokens.added.items()}
            made = model.tokenizer(renamed, legacy=bool(self._settings.get("legacy", True)))
            if model.puts_space_before:
                tokens.find_whole()
        else:
            raise DataError(
                f"a {self._class} has no {MODEL}; name LlamaTokenizer or PreTrainedTokenizerFast "
                f"as tokenizer_class in {SETTINGS}."
            )
        self._add(tokens, made)
        before, after = (
            # A text is a token that has the flag's name.
            None if isinstance(flag, str) or not flag else tokens.named.get(name)
            for name, flag in zip(_ENDS, map(self._settings.get, FLAGS), strict=True)
        )
        put_around(made, before, after)
        return made, tokens

    def _add(self, tokens: Tokens, made: tokenizers.Tokenizer) -> None:
        tokens.add_to(made)
        if self._class == "Qwen2Tokenizer":
            names = map(content_of, (*tokens.named.values(), *tokens.more))
            made.add_tokens([AddedToken(name, special=True) for name in names])

    def _compare_flag(self, begins: bool) -> None:
        """Warns if ``tokenizer.json`` and ``add_bos_token`` disagree about BOS before a text."""
        asked = self._settings.get("add_bos_token")
        if self._main is not None and type(asked) is bool and asked != begins:
            warn(
                f"{SETTINGS} has add_bos_token={str(asked).lower()}, but {MAIN} puts "
                f"{'one' if begins else 'none'} before a text, and in transformers 5 it decides; "
                "--begin_with_bos or --no-begin_with_bos overrides it."
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
    """Checks that ids are unique; warns of a token whose id is not the one in the files.

    Raises:
      DataError: two tokens share an id.
    """
    ids = collections.Counter(made.get_vocab(with_added_tokens=True).values())
    number, times = max(ids.items(), key=lambda item: item[1], default=(0, 0))
    if times > 1:
        raise DataError(f"{times} of its tokens have the id {number}.")
    asked = {token.content: number for number, token in tokens.added.items()}
    asked |= {entry["content"]: entry["id"] for entry in main.get("added_tokens") or []}
    moved = {
        text: (number, made.token_to_id(text))
        for text, number in asked.items()
        if made.token_to_id(text) not in (None, number)
    }
    for text, (number, now) in list(moved.items())[:1]:
        warn(
            f"The files of the tokenizer give {text!r} the id {number}, but it is read as {now}, "
            f"as in transformers: added tokens follow the vocabulary without a gap ({len(moved)} "
            "of them do not)."
        )


def _written(made: tokenizers.Tokenizer) -> str:
    """The content of a ``tokenizer.json`` from which the same ids are read.

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
    """The parts of a tokenizer that decide about ids and texts, each written in one way."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {n: simple(v) for n, v in value.items() if n != "trim_offsets"}
        return [simple(v) for v in value] if isinstance(value, list) else value

    found = json.loads(tokenizer.to_str())
    model = {name: value or None for name, value in found.pop("model").items()}
    return simple(found) | {"model": model}
