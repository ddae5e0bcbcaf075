"""Documents that an evaluation reads: so many of each domain; what it leaves out is named."""

from collections.abc import Iterable, Iterator

from dynmoe_jax.console import warn
from dynmoe_jax.data.sources.document import Broken, Document

_NAMED = 5
"""Records left out that are named."""


def wanted(
    documents: Iterable[Document | Broken], broken: list[Broken], limit: int | None
) -> Iterator[Document]:
    """Yields the documents of a source that can be read.

    Args:
      documents: of the source.
      broken: gets what cannot be read.
      limit: documents of each domain at the most; None: all.
    """
    taken: dict[str, int] = {}
    for document in documents:
        if isinstance(document, Broken):
            broken.append(document)
        elif limit is None or taken.get(document.domain, 0) < limit:
            taken[document.domain] = taken.get(document.domain, 0) + 1
            yield document


def name_left_out(broken: list[Broken]) -> None:
    """Warns of what was left out, by file and line."""
    for bad in broken[:_NAMED]:
        warn(f"{bad.origin} is left out: {bad.reason}.")
    if len(broken) > _NAMED:
        warn(f"{len(broken) - _NAMED} more records are left out.")
