"""Digests of a model's numbers."""

import numpy as np

from dynmoe_jax.edits.places import Place
from dynmoe_jax.edits.roles import Role
from dynmoe_jax.surgery.storage import digest
from dynmoe_jax.surgery.storage.digest import Digest

PLACE = Place(0, "feed_forward.down_EFD", 1)


def digest_of(values):
    made = Digest()
    made.add(PLACE, Role.PARAMETER, values)
    return made.hex()


def test_copies_that_are_one_array_are_hashed_once(monkeypatch):
    hashed = []
    sha256 = digest.hashlib.sha256
    monkeypatch.setattr(digest.hashlib, "sha256", lambda x: hashed.append(len(x)) or sha256(x))
    values = np.ones((3, 4), np.float32)
    values.flags.writeable = False
    first = digest_of(values)
    assert digest_of(values) == first
    assert digest_of(values.copy()) == first
    assert hashed.count(3) == 2


def test_an_array_that_has_changed_has_another_digest():
    values = np.ones(4, np.float32)
    first = digest_of(values)
    values[0] = 2
    assert digest_of(values) != first


def test_digests_of_arrays_that_are_gone_are_forgotten():
    def frozen(value):
        values = np.full(4, value, np.float32)
        values.flags.writeable = False
        return values

    # Memory that is given back is given out again: the same identity, another array.
    assert len({digest_of(frozen(value)) for value in range(50)}) == 50
    assert len(digest._known) < 5
