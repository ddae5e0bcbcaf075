"""Names of hardware, and what is said about wrong ones."""

import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.planning.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "devices", "is_tpu"),
    [
        ("v5p:4x4x4", 64, 64, True),
        ("v6e:8x8", 64, 64, True),
        ("tpu7x:2x2x1", 4, 8, True),
        ("h100:8", 8, 8, False),
        ("h100:4x8", 32, 32, False),
    ],
)
def test_names(name, chips, devices, is_tpu):
    topology = parse_topology(name)
    assert (topology.chips, topology.devices) == (chips, devices)
    assert topology.is_tpu == is_tpu


def test_slices_multiply_tpus_alone():
    assert parse_topology("v5p:4x4x4", slices=3).devices == 192
    assert parse_topology("h100:4x8", slices=4).devices == 32


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "such as v5p:4x4x4"),
        ("v5p", "not the name of a topology"),
        ("v5p:4by4", "not the name of a topology"),
        ("v5q:4x4x4", "'v5q' is not known; known are .* did you mean v5p"),
        ("v5p:8x8", "must give 3 numbers .* such as v5p:4x4x4"),
        ("v6e:4x4x4", "must give 2 numbers .* such as v6e:8x8"),
        ("h100:2x2x2", "must give 1 or 2 numbers"),
        ("v5p:4x4x0", "at least 1"),
    ],
)
def test_wrong_names_are_refused_in_a_sentence(name, says):
    with pytest.raises(ConfigError, match=says):
        parse_topology(name)


def test_slices_need_a_network_that_is_known():
    with pytest.raises(ConfigError, match=r"config\.mesh\.slice=2: the data-centre network of v4"):
        parse_topology("v4:2x2x2", slices=2)
