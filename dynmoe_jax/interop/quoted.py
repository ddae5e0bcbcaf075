"""Values and names of foreign files, as messages show them."""

import reprlib
from typing import Any

_LONGEST = 200
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxdict = _SHORT.maxlist = 8


def shown(value: Any) -> str:
    """A value of a foreign file as a message has it: on one line, and not long."""
    return _SHORT.repr(value)


def named(name: str) -> str:
    """A name of a foreign file, without quotes unless it is long or cannot be printed."""
    return name if name.isprintable() and len(name) <= _LONGEST else shown(name)
