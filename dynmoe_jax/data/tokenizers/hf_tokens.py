"""The special and the added tokens of a folder in Hugging Face's format.

Four files may hold them.  ``tokenizer_config.json`` names the special ones.  If it describes added
tokens too (``added_tokens_decoder``), these are all; if not, ``special_tokens_map.json`` overrides
the names, and ``added_tokens.json`` and ``tokenizer.json`` list the added ones.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dynmoe_jax.data.errors import DataError

NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_MORE, _FORMER = "extra_special_tokens", "additional_special_tokens"
_DESCRIBED = "added_tokens_decoder"

Token = str | AddedToken


@dataclasses.dataclass
class Tokens:
    """The tokens that a folder adds to those of its model.

    Attributes:
      named: special tokens by name, ``bos_token`` and others; those of :data:`NAMED` first.
      more: special tokens without a name.
      added: added tokens by the id that the files give them.
    """

    named: dict[str, Token]
    more: list[Token]
    added: dict[int, AddedToken]

    def add_to(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Adds the tokens: one that the model has keeps its id, another one gets the next id.

        Args:
          tokenizer: what they are added to; it may have some of them already.
        """
        there = tokenizer.get_added_tokens_decoder().values()
        new: list[Token] = [token for _, token in sorted(self.added.items())]
        known = {token.content for token in (*there, *new)}
        new += [
            token for token in (*self.named.values(), *self.more) if content_of(token) not in known
        ]
        names = {content_of(token) for token in self.named.values()}
        tokenizer.add_tokens([_special(token, names) for token in new])

    def find_whole(self) -> None:
        """Has the added tokens found in a text before it is normalized."""
        for number, token in self.added.items():
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
            whole = AddedToken(token.content, normalized=False, special=token.special, **flags)
            self.added[number] = whole


def content_of(token: Token) -> str:
    """The text that stands for a token."""
    return token if isinstance(token, str) else token.content


def read_tokens(
    settings: Mapping[str, Any],
    special: Mapping[str, Any],
    added: Mapping[str, Any],
    main: Mapping[str, Any],
    usual: Mapping[str, Token],
    usual_more: Sequence[Token] | None = None,
) -> Tokens:
    """The tokens that the four files of a folder hold.

    Args:
      settings: what ``tokenizer_config.json`` holds.
      special: what ``special_tokens_map.json`` holds.
      added: what ``added_tokens.json`` holds.
      main: what ``tokenizer.json`` holds.
      usual: named tokens where the files are silent; null is not silence.
      usual_more: special tokens without a name where ``tokenizer_config.json`` is silent.

    Raises:
      DataError: an entry is no token.
    """
    found = dict(settings)
    if _FORMER in found and not found.get(_MORE):
        found[_MORE] = found.pop(_FORMER)
    own_names = {
        name: found.pop(name)
        for name in [*found]
        if _is_name(name) and name not in NAMED and isinstance(found[name], str)
    }
    if isinstance(found.get(_MORE), dict):
        own_names |= found.pop(_MORE)
    if _DESCRIBED in found:
        entries = _object(found[_DESCRIBED], _DESCRIBED)
        by_id = {_number(number): _token(entry) for number, entry in entries.items()}
    else:
        own_names |= _with_special_map(found, special)
        by_id = _listed(found, added, main)
    texts = {token.content: token for token in by_id.values()}
    for token in by_id.values():
        if repr(token) != repr(texts[token.content]):
            raise DataError(f"{token.content!r} is described twice, each time otherwise.")
    named: dict[str, Token] = {}
    for name in NAMED:
        token = _token(found[name], str) if found.get(name) is not None else None
        token = usual.get(name) if name not in found else token and texts.get(str(token), token)
        if token is not None:
            named[name] = token
    for name, token in found.items():
        if _is_name(name) and name not in NAMED and isinstance(token, dict | str):
            named[name] = _token(token, str)
    named |= {name: _token(token, str) for name, token in own_names.items()}
    if usual_more is not None:
        found.setdefault(_MORE, list(usual_more))
    more = found.get(_MORE, found.get(_FORMER)) or []
    if not isinstance(more, list):
        raise DataError(f"{_MORE}={more!r} is no list of tokens.")
    return Tokens(named, [_token(token, str) for token in more], by_id)


def _with_special_map(found: dict[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides settings with those of the map; returns the tokens that have names of their own."""
    for name, value in special.items():
        if name.startswith("add_"):
            raise DataError(f"special_tokens_map.json has {name}, which is no token; take it out.")
        if isinstance(value, dict) and name != _MORE:
            value = _token({**value, "special": True})
        elif isinstance(value, list) and name == _MORE:
            value = [*(found.get(_MORE) or []), *value]
        found[name] = value
    return found.pop(_MORE) if isinstance(found.get(_MORE), dict) else {}


def _listed(
    found: Mapping[str, Any], added: Mapping[str, Any], main: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """Tokens of ``added_tokens.json`` and ``tokenizer.json``, by id."""
    special = {str(found[name]) for name in NAMED if found.get(name)}
    special.update(str(token) for token in found.get(_MORE) or [])
    by_id = {
        _number(number): AddedToken(text, normalized=text not in special, special=text in special)
        for text, number in added.items()
    }
    for entry in main.get("added_tokens") or []:
        number = _number(_object(entry, "added_tokens").get("id"))
        by_id[number] = _token(entry)
    return by_id


def _is_name(name: str) -> bool:
    return name.endswith("_token")


def _special(token: Token, names: Iterable[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in names:
        token.special = True
    return token


def _token(entry: Any, *kinds: type) -> Any:
    """A token that is one, is of other kinds that are allowed, or is described by an object."""
    if isinstance(entry, (AddedToken, *kinds)):
        return entry
    entry = _object(entry, "a token")
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    try:
        return AddedToken(**flags)
    except TypeError as error:
        raise DataError(f"{entry!r} does not describe a token: {error}.") from error


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{name} must be a JSON object, not {value!r}.")
    return value


def _number(value: Any) -> int:
    if type(value) is int or (isinstance(value, str) and value.isdecimal()):
        return int(value)
    raise DataError(f"the id of an added token is {value!r}, no whole number.")
