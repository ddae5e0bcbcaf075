"""Text that a result is measured on, and that statistics are gathered of."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.data import (
    Batch,
    DataError,
    Prepared,
    Tokenizer,
    check_sources,
    document_batches,
    find_tokenizer,
    for_rows,
    is_prepared,
    kept_tokenizer,
    prepare,
)
from dynmoe_jax.data.preparation.prepare import template_for
from dynmoe_jax.surgery.storage.parent import Parent

TOKENS_AT_ONCE = 2048
"""Tokens of a batch, or one sequence."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Prepared text and its tokenizer.

    Attributes:
      data: settings of the text.
      prepared: the documents; those held out are for measuring alone.
      tokenizer: of the model.
    """

    data: config.Data
    prepared: Prepared
    tokenizer: Tokenizer

    def heldout(self, tokens: int) -> dict[str, list[Batch]]:
        """Batches of held-out text by domain, of about so many tokens in all.

        Raises:
          DataError: there is none.
        """
        found = self._batches(self.prepared.open_heldout, tokens, None)
        if not found:
            raise DataError(
                f"config.data.sources={self.data.sources!r} gives no two different documents, so "
                "none is held out to measure on; name other text: --data=SOURCES."
            )
        return found

    def training(self, tokens: int, seed: int) -> dict[str, list[Batch]]:
        """Batches of training text by domain, of about so many tokens in all, drawn by a seed."""
        return self._batches(self.prepared.open_train, tokens, seed)

    def _batches(self, opened: Callable, tokens: int, seed: int | None) -> dict[str, list[Batch]]:
        documents = {name: opened(name) for name in self.prepared.domains}
        documents = {name: own for name, own in documents.items() if len(own)}
        rows = max(1, TOKENS_AT_ONCE // self.data.seq_len)
        each = math.ceil(tokens / (rows * self.data.seq_len * max(1, len(documents))))
        given = self.tokenizer, self.data, rows, each, seed
        return {name: list(document_batches(own, *given)) for name, own in documents.items()}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the text of a result comes from.

    Attributes:
      data: settings as the result keeps them.
      directory: where prepared text lies; None: in the folder of the result.
    """

    data: config.Data
    directory: Path | None

    def open(self, result: Path, tokenizer: Tokenizer, rows: int) -> Text:
        """Prepares the text, or finds it prepared.

        Args:
          result: folder of the result.
          tokenizer: of the model.
          rows: of its embedding.

        Raises:
          DataError: a source cannot be read.
        """
        prepared = prepare(
            self.data, self.directory or result / "data", template_for(self.data, tokenizer)
        )
        return Text(self.data, prepared, for_rows(tokenizer, rows))


def source_of(parent: Parent, sources: str) -> Source:
    """The text of a result: what the user names, or that of the parent.

    Args:
      parent: the first one.
      sources: as the user named them; may be empty.

    Raises:
      ConfigError: the parent has no text of its own, and none is named.
      DataError: a source is not there.
    """
    data = parent.config.data
    if sources:
        named = dataclasses.replace(data, sources=sources, directory="")
        check_sources(named)
        return Source(named, None)
    if parent.is_foreign or (parent.model.imported and not parent.history):
        raise config.ConfigError(
            f"--from={parent.folder} was trained elsewhere, on text that is not known here; name "
            "some to measure with: --data=SOURCES, such as --data=python."
        )
    own = Path(data.directory).expanduser() if data.directory else parent.folder / "data"
    own = own.absolute()
    try:
        has_own = find_tokenizer(parent.folder)
        template = template_for(data, kept_tokenizer(parent.folder)) if has_own else None
        there = is_prepared(data, own, template)
    except DataError as error:
        said = str(error).removesuffix(".")
        raise DataError(f"{said}, or name other text to measure with: --data=SOURCES.") from error
    # Nothing is written into a parent's folder.
    kept = dataclasses.replace(data, directory=str(own) if there else "")
    return Source(kept, own if there else None)
