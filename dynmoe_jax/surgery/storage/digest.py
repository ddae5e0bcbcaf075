"""Digest of a model's numbers, whatever the order in which they are met and how they are stored."""

import hashlib
import weakref

import numpy as np

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role

_known: dict[int, tuple[weakref.ref, str]] = {}
"""Digests of arrays that are still there and that nobody can write to, by identity."""


class Digest:
    """SHA-256 over those of all arrays, each with its place, sorted."""

    def __init__(self):
        self._found: dict[str, str] = {}

    def __contains__(self, place: Place) -> bool:
        """Whether the parameter in a place was added."""
        return self._name(place, Role.PARAMETER) in self._found

    @staticmethod
    def _name(place: Place, role: Role) -> str:
        return ":".join(map(str, (role.value, place.layer, place.name, place.expert)))

    def add(self, place: Place, role: Role, values: np.ndarray) -> None:
        """Takes in an array as it will be read: float32, of whatever type it is stored in."""
        self._found[self._name(place, role)] = f"{values.shape} {_sha256(values)}"

    def hex(self) -> str:
        """The digest of all that was added."""
        lines = (f"{name} {own}\n" for name, own in sorted(self._found.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(values: np.ndarray) -> str:
    """Digest of one array; computed once where the same array is met again, as copies of a
    feed-forward are."""
    reference, own = _known.get(id(values), (None, ""))
    if reference is None or reference() is not values:
        own = hashlib.sha256(np.ascontiguousarray(values)).hexdigest()
        if not values.flags.writeable:
            key = id(values)
            _known[key] = weakref.ref(values, lambda _: _known.pop(key, None)), own
    return own
