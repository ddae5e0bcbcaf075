"""The tokens of a GGUF file: the keys ``tokenizer.ggml.*``, checked as llama.cpp checks them."""

import collections
import functools
from collections.abc import Callable
from typing import Any

from dynmoe_jax.runs.errors import CheckpointError

CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens that are found in a text before it is cut."""
_KEYS = "tokenizer.ggml."


class GgufVocabulary:
    """The vocabulary that a file's metadata describes; each part is read when it is asked for.

    Args:
      metadata: the value of a key, None where it is missing.

    Raises:
      CheckpointError: of every part: a key does not hold what it must hold.
    """

    def __init__(self, metadata: Callable[[str], Any]):
        self._metadata = metadata

    def value(self, name: str, kind: type) -> Any:
        """The value of a key of :data:`_KEYS`, which has a type; None where it is missing."""
        try:
            value = self._metadata(_KEYS + name)
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{_KEYS}{name} of the GGUF file cannot be read: {error}."
            ) from error
        if value is not None and type(value) is not kind:
            raise CheckpointError(
                f"{_KEYS}{name} of the GGUF file is {str(value)[:40]!r}, no {kind.__name__}."
            )
        return value

    @functools.cached_property
    def tokens(self) -> list[str]:
        """Texts of the tokens, by id."""
        found = self._list("tokens", str)
        if not found:
            raise CheckpointError(f"the GGUF file has no {_KEYS}tokens.")
        token, number = collections.Counter(found).most_common(1)[0]
        if number > 1:
            raise CheckpointError(f"{_KEYS}tokens of the GGUF file has {token!r} twice.")
        return found

    @functools.cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of tokens that are merged, the first ones first."""
        found = self._list("merges", str)
        if found is None:
            raise CheckpointError(
                f"the GGUF file has no {_KEYS}merges, without which text cannot be cut into its "
                "byte-level tokens; convert the model again."
            )
        known, pairs = set(self.tokens), []
        for merge in found:
            # The first token has at least one character.
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not {left, right, left + right} <= known:
                raise CheckpointError(
                    f"{_KEYS}merges of the GGUF file has {merge!r}, no two tokens that make a "
                    "third."
                )
            pairs.append((left, right))
        return pairs

    @functools.cached_property
    def token_types(self) -> list[int]:
        """Kinds of the tokens, as llama.cpp counts them; empty if the file is silent."""
        found = self._list("token_type", int) or []
        if found and len(found) < len(self.tokens):
            raise CheckpointError(
                f"the GGUF file has {len(self.tokens)} tokens, but only {len(found)} entries in "
                f"{_KEYS}token_type."
            )
        return found

    @functools.cached_property
    def named(self) -> dict[str, str]:
        """Texts of the tokens that have a name: ``bos``, ``eos``, ``unk``, ``pad``."""
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self.value(f"{key}_token_id", int) for name, key in keys.items()}
        for name, number in ids.items():
            if number is not None and not 0 <= number < len(self.tokens):
                raise CheckpointError(
                    f"{_KEYS}{keys[name]}_token_id of the GGUF file is {number}, but it has "
                    f"{len(self.tokens)} tokens."
                )
        return {name: self.tokens[number] for name, number in ids.items() if number is not None}

    @functools.cached_property
    def control(self) -> set[str]:
        """Texts of the tokens that stand for no text."""
        kinds = zip(self.tokens, self.token_types, strict=False)
        return {token for token, kind in kinds if kind == CONTROL}

    def around(self, begins: bool) -> tuple[str | None, str | None]:
        """Tokens that stand before and after a text, None for none.

        Args:
          begins: whether BOS stands before it if no key says so.
        """
        asked = {name: self.value(f"add_{name}_token", bool) for name in ("bos", "eos")}
        if asked["bos"] is None:
            asked["bos"] = begins
        for name in asked:
            if asked[name] and name not in self.named:
                raise CheckpointError(
                    f"the GGUF file asks for {name.upper()} around a text "
                    f"({_KEYS}add_{name}_token, or the kind of its tokenizer), but has no "
                    f"{_KEYS}{name}_token_id."
                )
        before, after = (self.named[name] if asked[name] else None for name in ("bos", "eos"))
        return before, after

    def _list(self, name: str, kind: type) -> list | None:
        found = self.value(name, list)
        if found is not None and not all(type(item) is kind for item in found):
            raise CheckpointError(f"{_KEYS}{name} of the GGUF file is no list of {kind.__name__}.")
        return found
