"""Part of the training documents, dealt out by chance (``config.data.part``).

Of several runs each reads a part of its own, whatever the domains are: the control of branches by
domain.
"""

import re
from collections.abc import Sequence

import grain

from dynmoe_jax.data.errors import DataError

_SEED = 0x70617274
"""Seed of the deal, the same in all runs, so that parts do not overlap."""


def parse_part(part: str) -> tuple[int, int]:
    """(number from 1, parts) of ``"2/3"``; an empty string is all in one part.

    Raises:
      DataError: it is no such pair.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    number, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= parts:
        raise DataError(
            f"config.data.part={part!r} must be a number and how many parts there are, such as "
            "'2/3' for the second of three."
        )
    return number, parts


def part_of(documents: Sequence[dict], part: str, domain: str) -> Sequence[dict]:
    """The documents of a domain that a part has.

    Args:
      documents: all of the domain.
      part: ``config.data.part``; empty: all, as they are.
      domain: its name.

    Raises:
      DataError: there is none.
    """
    number, parts = parse_part(part)
    if parts == 1:
        return documents
    if len(documents) < parts:
        raise DataError(
            f"config.data.part={part!r} asks for {parts} parts, and {domain} has "
            f"{len(documents)} documents; ask for fewer."
        )
    return grain.MapDataset.source(documents).shuffle(seed=_SEED)[number - 1 :: parts]
