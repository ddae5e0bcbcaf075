"""The memory budget of kernels: what each TPU has, and what a kernel may take of it."""

import pytest

from dynmoe_jax.hardware import vmem
from dynmoe_jax.hardware.chips import CHIPS
from dynmoe_jax.hardware.target import Target


@pytest.mark.parametrize(
    ("kind", "mib", "more"),
    [
        ("TPU v2", 16, False),
        ("TPU v3", 16, False),
        ("TPU v4", 16, False),
        ("TPU v5 lite", 128, True),
        ("TPU v5", 64, True),
        ("TPU v6 lite", 128, True),
        ("TPU7x", 64, True),
        # Unknown: the least is counted on, but whole sequences may be tried.
        ("TPU v9", 16, True),
    ],
)
def test_vmem_of_a_core(kind, mib, more):
    target = Target("tpu", kind)
    assert vmem.vmem_bytes(target) == mib * 2**20
    assert vmem.exceeds_default(target) == more


@pytest.mark.parametrize("chip", [chip for chip in CHIPS.values() if chip.vmem_bytes])
def test_tiles_leave_room_for_what_the_compiler_adds(chip):
    counted, allowed = vmem.tile_budget(chip.vmem_bytes), vmem.kernel_limit(chip.vmem_bytes)
    assert counted < allowed < chip.vmem_bytes
    assert max(vmem.MEGABLOX_BUDGET, vmem.COMBINE_BUDGET) < vmem.DEFAULT_LIMIT <= chip.vmem_bytes
    if vmem.exceeds_default(Target("tpu", chip.device_kind)):
        assert chip.vmem_bytes > vmem.FLAT_ATTENTION_BUDGET
