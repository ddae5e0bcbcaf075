"""Layers by number, as people write them: ``2,5-7``."""

import re

from dynmoe_jax.fields import ConfigError


def layers_from(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that ``--layers`` names, rising; all of them where it is empty.

    Raises:
      ConfigError: it names none, or one that the model does not have.
    """
    if not text:
        return tuple(range(num_layers))
    found: set[int] = set()
    for piece in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", piece)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last < num_layers:
            raise ConfigError(
                f"--layers={text} names {piece.strip()!r}; name layers from 0 to {num_layers - 1}, "
                "such as 2,5-7."
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))
