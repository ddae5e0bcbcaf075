"""AdamW's moments in a checkpoint: that of a training, or of a model that was made from others.

A training writes the optimizer's state as it is.  A model that was not trained there may hold, in
place of one, a group :data:`GROUP`: ``Moments(first, second, count)._asdict()``.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import optax

GROUP = "moments"

ADAM = optax.ScaleByAdamState.__name__
"""Name of that part of an optimizer's state that holds the moments."""

OPTAX_NAMES = {"first": "mu", "second": "nu", "count": "count"}
"""Optax's names of the fields of :class:`Moments`."""


class Moments(NamedTuple):
    """AdamW's memory of gradients.

    Attributes:
      first: of each trainable parameter: running mean of its gradient; a tree like theirs.
      second: running mean of its gradient's squares.
      count: updates that went into them, an int32.
    """

    first: Any
    second: Any
    count: Any


def find_moments(names: Iterable[str]) -> dict[str, str]:
    """Finds where a checkpoint has its moments.

    Args:
      names: dotted names of its arrays.

    Returns:
      dotted name of each field of :class:`Moments`, under which the arrays of parameters are; empty
      if there are none.
    """
    names = sorted(names)
    if any(name.startswith(f"{GROUP}.") for name in names):
        return {field: f"{GROUP}.{field}" for field in Moments._fields}
    adam = re.compile(rf"(optimizer(?:\.\w+)*?)\.{OPTAX_NAMES['first']}\.")
    found = next(filter(None, map(adam.match, names)), None)
    return {field: f"{found[1]}.{OPTAX_NAMES[field]}" for field in Moments._fields} if found else {}
