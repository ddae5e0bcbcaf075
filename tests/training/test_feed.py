"""Which rows a process reads, for meshes whose devices are spread over processes in any way."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax.training import feed


class Spread:
    """A sharding of 8 rows, of which the devices of this process hold some."""

    is_fully_addressable = False

    def __init__(self, *slices):
        self.slices = slices

    def addressable_devices_indices_map(self, shape):
        return {number: (rows, slice(None, None, None)) for number, rows in enumerate(self.slices)}


@pytest.mark.parametrize(
    ("slices", "rows"),
    [
        ([slice(None)], range(8)),  # one device, or an axis that does not split the batch
        ([slice(0, 2), slice(2, 4)], range(4)),
        ([slice(4, 6), slice(0, 2)], [0, 1, 4, 5]),  # no neighbours, in no order
        ([slice(2, 4), slice(2, 4)], [2, 3]),  # two devices with the same rows
    ],
)
def test_rows_follow_from_the_sharding(slices, rows):
    np.testing.assert_array_equal(feed.rows_here(Spread(*slices), (8, 4)), list(rows))


def test_parts_come_to_the_rows_that_they_are_of(monkeypatch):
    """Of rows 2 to 5 that a process has read, each device gets those that it holds."""
    whole = np.arange(32).reshape(8, 4)
    asked = [(slice(4, 6), slice(None)), (slice(2, 3), slice(0, 2))]
    parts = []

    def assemble(shape, sharding, part):
        assert shape == (8, 4)
        parts.extend(part(index) for index in asked)

    monkeypatch.setattr(jax, "make_array_from_callback", assemble)
    feed._placed({"tokens": whole[2:6]}, np.arange(2, 6), (8, 4), Spread())
    for part, index in zip(parts, asked, strict=True):
        np.testing.assert_array_equal(part, whole[index])


def test_whole_batch_of_one_process_lies_as_the_mesh_says():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    batch = {"tokens": np.arange(32).reshape(8, 4)}
    sharding = NamedSharding(mesh, P("data"))
    placed = feed.place_whole(batch, sharding)["tokens"]
    assert placed.sharding == sharding
    np.testing.assert_array_equal(placed, batch["tokens"])
