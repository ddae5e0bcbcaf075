"""The table of chips."""

from dynmoe_jax.hardware.chips import CHIPS, chip_of


def test_chips_are_known_by_their_device_kind():
    assert chip_of("NVIDIA H100 80GB HBM3") is CHIPS["h100"]
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("TPU v6 lite") is CHIPS["v6e"]
    assert chip_of("cpu") is None
