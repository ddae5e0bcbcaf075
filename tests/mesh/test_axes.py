"""How parameters lie on a mesh, by hand."""

import pytest
from jax.sharding import PartitionSpec as P

from dynmoe_jax.mesh.axes import axes_of, parameter_spec


def test_axes_of_names():
    assert axes_of("gate_up_ED2F") == ["E", "D", "2F"]
    assert axes_of("shared_router_D1") == ["D", "1"]
    assert axes_of("query_bias_HW") == ["H", "W"]
    assert axes_of("scale") == []


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "wanted"),
    [
        # A stack of layers in front stays whole; experts along expert, pieces along data.
        ("gate_up_ED2F", (3, 4, 8, 6), {"data": 2, "expert": 2}, P(None, "expert", "data", None)),
        # Gate and up are cut along D by model too, data first.
        ("gate_up_ED2F", (4, 8, 6), {"data": 2, "model": 2}, P(None, ("data", "model"), None)),
        # D is last, so the pieces are of F, within the half that model gives to a device.
        ("down_EFD", (4, 8, 6), {"data": 2, "model": 2}, P(None, ("model", "data"), None)),
        ("down_EFD", (4, 8, 6), {"data": 2, "expert": 4}, P("expert", "data", None)),
        # Without experts a parameter is shared along expert as well.
        ("query_DHW", (8, 2, 4), {"data": 2, "expert": 2}, P(("data", "expert"), None, None)),
        # Two heads are not four pieces; the four units of a head are.
        ("output_HWD", (2, 4, 8), {"data": 2, "expert": 2}, P(None, ("data", "expert"), None)),
        ("embedding_VD", (12, 8), {"data": 2, "model": 3}, P(("model", "data"), None)),
        ("output_DV", (8, 12), {"data": 2, "model": 3}, P("data", "model")),
        # What nothing divides stays whole.
        ("output_DV", (7, 13), {"data": 2, "model": 3}, P(None, None)),
        ("query_bias_HW", (2, 4), {"data": 2, "model": 2}, P("model", None)),
        ("scale", (3, 8), {"data": 2, "model": 2}, P(None, None)),
        # Slices have copies.
        ("query_DHW", (8, 2, 4), {"slice": 2}, P(None, None, None)),
    ],
)
def test_where_parameters_lie(name, shape, sizes, wanted):
    assert parameter_spec(name, shape, sizes) == wanted
