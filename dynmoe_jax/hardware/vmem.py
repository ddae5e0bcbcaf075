"""Memory budget of kernels on TPU: the VMEM of a core, and how much of it a kernel may fill.

Kernels count the bytes that their tiles hold and compare the sum with a budget from here; no other
module states one.  Counts are estimates, so that each budget leaves room for what the compiler
adds.
"""

from dynmoe_jax.hardware.chips import CHIPS, chip_of
from dynmoe_jax.hardware.target import Target

_MIB = 2**20

DEFAULT_LIMIT = 16 * _MIB
"""VMEM that the compiler gives a kernel that asks for no more; every TPU has as much."""

COUNTED_SHARE = 0.7
"""Share of VMEM that tiles may fill by the count of their kernel, which asks for more than the
default."""

ALLOWED_SHARE = 0.9
"""Share of VMEM that such a kernel asks the compiler for: its tiles, and what the compiler adds."""

MEGABLOX_BUDGET = 14 * _MIB
"""Bytes that tiles of Megablox may take of the default limit, which those kernels cannot raise.
What is counted lies a little below what the compiler counts (docs/measurements.md:
v5p-vmem-count)."""

COMBINE_BUDGET = 12 * _MIB
"""Bytes that one program of the combine kernel may take of the default limit."""

FLAT_ATTENTION_BUDGET = 56 * _MIB
"""Bytes that a program of flat attention, which holds whole sequences, may take; the table of chips
has the VMEM of a core."""

TOKEN_TILE_ELEMENTS = 2**18
"""Numbers of one array in a tile of tokens: 256 tokens of D = 1024; four arrays, twice, are 4 MiB
in bfloat16, within the default limit."""

_OLD_TPUS = ("TPU v2", "TPU v3")
"""TPUs of 16 MiB of VMEM that are not in the table of chips."""


def vmem_bytes(target: Target) -> int:
    """Bytes of the VMEM of one core of a TPU; of an unknown TPU, the least that any has."""
    chip = chip_of(target.kind)
    return chip.vmem_bytes if chip else min(c.vmem_bytes for c in CHIPS.values() if c.vmem_bytes)


def tile_budget(vmem_bytes: int) -> float:
    """Bytes that tiles may fill, by the count of their kernel, of so many bytes of VMEM."""
    return COUNTED_SHARE * vmem_bytes


def kernel_limit(vmem_bytes: int) -> int:
    """Bytes that a kernel asks the compiler for (``vmem_limit_bytes``), of so many of VMEM."""
    return int(ALLOWED_SHARE * vmem_bytes)


def exceeds_default(target: Target) -> bool:
    """Whether a core has more VMEM than the default limit; unknown TPUs count as recent ones."""
    chip = chip_of(target.kind)
    if chip:
        return chip.vmem_bytes > DEFAULT_LIMIT
    return not any(kind in target.kind for kind in _OLD_TPUS)
