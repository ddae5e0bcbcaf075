"""Bytes, mesh axes and times of collectives, by hand."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.collectives import HOP_SECONDS, Network, groups_of, kind_of
from dynmoe_jax.planning.hlo.instruction import parse_instruction

LINK, NETWORK = 100e9, 5e9
CHIP = Chip(1e12, 1e12, "TPU v5", links=6, link_bytes_per_s=LINK, network_bytes_per_s=NETWORK)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a described TPU says of itself."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform: str = "tpu"


class Devices:
    """Stands in for a mesh: JAX's own takes its devices only."""

    def __init__(self, shape, names, slices=1):
        count = int(np.prod(shape)) // slices
        places = [(s, n) for s in range(slices) for n in range(count)]
        # 4 x 4 chips in the first two directions, as many planes as needed.
        devices = [Device(i, (n % 4, n // 4 % 4, n // 16), s) for i, (s, n) in enumerate(places)]
        self.devices = np.array(devices, dtype=object).reshape(shape)
        self.axis_names, self.size = names, len(devices)


def collective(text):
    return parse_instruction("c", text)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_in_every_way_that_they_are_written(groups, expected):
    text = f"f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    assert groups_of(collective(text), devices=4).tolist() == expected


def test_a_permutation_takes_the_way_of_all_its_pairs():
    """Swapping rows and columns of 4 x 4 chips, of which the diagonal keeps its own."""
    network = Network(Devices((16,), ("data",)), CHIP)
    pairs = ",".join(f"{{{4 * i + j},{4 * j + i}}}" for i in range(4) for j in range(4))
    text = f"f32[400]{{0}} collective-permute(%x), source_target_pairs={{{pairs}}}"
    transfer = network.transfer(collective(text))
    assert (transfer.axes, transfer.bytes) == ("data", 1600)
    # |i - j| apart on rings of four, both ways: of twelve pairs eight are neighbours, four are not.
    mean_hops, most_hops = (8 * 1 + 4 * 2) / 12, 2 + 2
    assert transfer.seconds == pytest.approx(mean_hops * 1600 / LINK + most_hops * HOP_SECONDS)


def test_a_permutation_that_moves_nothing_takes_no_time():
    network = Network(Devices((4,), ("data",)), CHIP)
    text = "f32[400]{0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}"
    assert network.transfer(collective(text)).seconds == 0


def test_groups_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="groups of the collective c"):
        groups_of(collective("f32[8]{0} all-reduce(%x), replica_groups=odd"), devices=4)


def test_kinds():
    assert kind_of(collective("f32[8]{0} all-gather(%x), dimensions={0}")) == "all-gather"
    assert kind_of(collective("(f32[8]{0}) all-to-all-start(%x)")) == "all-to-all"
    assert kind_of(collective("f32[8]{0} all-gather-done(%x)")) is None
    assert kind_of(collective("f32[8]{0} add(%x, %x)")) is None


ROW = "mesh['a'=4,'b'=4] {'b'}"


@pytest.mark.parametrize(
    ("text", "sent", "seconds"),
    [
        # 1600 bytes come together from four; a ring of four has two links to a chip.
        ("f32[400]{0} all-gather(%x)", 1200, 1200 / (2 * LINK)),
        ("f32[100]{0} reduce-scatter(%x)", 1200, 1200 / (2 * LINK)),
        # As much as a reduce-scatter and an all-gather.
        ("f32[400]{0} all-reduce(%x)", 2400, 2400 / (2 * LINK)),
        # Two arrays in one.
        ("(f32[300]{0}, f32[100]{0}) all-reduce(%x, %y)", 2400, 2400 / (2 * LINK)),
        # Operand and result in one: the result counts.
        ("(f32[100]{0}, f32[400]{0}) all-gather-start(%x)", 1200, 1200 / (2 * LINK)),
        # A byte makes one hop on average (0, 1, 2, 1), on one of two links.
        ("f32[400]{0} all-to-all(%x)", 1200, 1600 / 2 / LINK),
    ],
)
def test_bytes_and_seconds_along_a_ring_of_four(text, sent, seconds):
    network = Network(Devices((4, 4), ("data", "expert")), CHIP)
    transfer = network.transfer(collective(f"{text}, replica_groups={ROW}"))
    assert transfer.axes == "expert"
    assert transfer.bytes == sent
    assert transfer.seconds == pytest.approx(seconds + 2 * HOP_SECONDS)


def test_a_group_that_is_a_plane_uses_the_links_of_both_directions():
    network = Network(Devices((4, 4), ("data", "expert")), CHIP)
    transfer = network.transfer(collective("f32[400]{0} all-gather(%x), replica_groups={}"))
    assert transfer.axes == "data+expert"
    assert transfer.seconds == pytest.approx(1500 / (4 * LINK) + 4 * HOP_SECONDS)


def test_part_of_a_ring_is_a_line():
    network = Network(Devices((4, 2, 2), ("data", "expert", "model")), CHIP)
    groups = "{{0,1},{2,3},{4,5},{6,7},{8,9},{10,11},{12,13},{14,15}}"
    transfer = network.transfer(
        collective(f"f32[400]{{0}} all-gather(%x), replica_groups={groups}")
    )
    assert transfer.axes == "model"
    assert transfer.seconds == pytest.approx(800 / LINK + HOP_SECONDS)


def test_slices_share_the_network_of_the_data_centre():
    network = Network(Devices((2, 4, 4), ("slice", "data", "expert"), slices=2), CHIP)
    groups = "mesh['s'=2,'a'=4,'b'=4] {'s'}"
    transfer = network.transfer(
        collective(f"f32[400]{{0}} all-reduce(%x), replica_groups={groups}")
    )
    assert transfer.axes == "slice"
    # Half of 2 x 1600 bytes over each device's own share of the network.
    assert transfer.seconds == pytest.approx(1600 / NETWORK + HOP_SECONDS)


def test_a_permutation_goes_over_one_link():
    network = Network(Devices((4, 4), ("data", "expert")), CHIP)
    pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"
    transfer = network.transfer(collective(f"f32[400]{{0}} collective-permute(%x), {pairs}"))
    assert (transfer.axes, transfer.bytes) == ("expert", 1600)
    assert transfer.seconds == pytest.approx(1600 / LINK + HOP_SECONDS)


def test_real_devices_without_places_are_one_link_apart():
    import jax

    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    transfer = Network(mesh, CHIP).transfer(
        collective("f32[4]{0} all-gather(%x), replica_groups={}")
    )
    assert (transfer.axes, transfer.bytes) == ("?", 0)
