"""Data sheets of chips: what a JAX device can do at best, in one table.

Training metrics, tile sizes, the planner and benchmarks read it here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates and memory of one JAX device at best, from the data sheet of its chip.

    Attributes:
      flops_per_s: dense bfloat16 matrix products.
      bytes_per_s: main memory.
      device_kind: what ``jax.Device.device_kind`` of such a chip contains.
      memory_bytes: of the main memory.
      links: to neighbouring chips, of a TPU's torus; 1 for a GPU's NVLink.
      link_bytes_per_s: of one link, each way.
      network_bytes_per_s: a device's share of the data-centre network, each way; 0 = not known.
      clock_hz: of a TPU's cores; 0 = not known.
      product_width: side of a TPU's matrix units, which narrower operands leave idle.
      latch_rows: rows of one operand that a matrix unit multiplies while it latches
        ``product_width`` x ``product_width`` of the other: fewer rows take no less time.
      devices_per_chip: JAX devices that share a chip.
      vmem_bytes: VMEM of each core of a TPU.
    """

    flops_per_s: float
    bytes_per_s: float
    device_kind: str = ""
    memory_bytes: float = 0.0
    links: int = 1
    link_bytes_per_s: float = 0.0
    network_bytes_per_s: float = 0.0
    clock_hz: float = 0.0
    product_width: int = 1
    devices_per_chip: int = 1
    vmem_bytes: int = 0
    latch_rows: int = 1


_MIB, _GIB = 2**20, 2**30
CHIPS = {
    "a100": Chip(312e12, 2.04e12, "A100", 80e9, 1, 300e9, 25e9),
    "a800": Chip(312e12, 2.04e12, "A800", 80e9, 1, 200e9, 25e9),
    "h100": Chip(989e12, 3.35e12, "H100", 80e9, 1, 450e9, 50e9),
    "h200": Chip(989e12, 4.8e12, "H200", 141e9, 1, 450e9, 50e9),
    "b200": Chip(2250e12, 8.0e12, "B200", 180e9, 1, 900e9, 50e9),
    "v4": Chip(275e12, 1.23e12, "TPU v4", 32 * _GIB, 6, 50e9, 0.0, 1.05e9, 128, 1, 16 * _MIB, 128),
    "v5e": Chip(
        197e12, 0.82e12, "TPU v5 lite", 16 * _GIB, 4, 50e9, 3.125e9, 1.5e9, 128, 1, 128 * _MIB, 64
    ),
    "v5p": Chip(
        459e12, 2.77e12, "TPU v5", 95 * _GIB, 6, 100e9, 6.25e9, 1.75e9, 128, 1, 64 * _MIB, 64
    ),
    "v6e": Chip(
        918e12, 1.64e12, "TPU v6 lite", 32 * _GIB, 4, 100e9, 12.5e9, 1.75e9, 256, 1, 128 * _MIB, 144
    ),
    "tpu7x": Chip(
        1153.5e12, 3.69e12, "TPU7x", 96 * _GIB, 6, 50e9, 0.0, 2.2e9, 256, 2, 64 * _MIB, 256
    ),
}
"""Data sheets: NVIDIA A100 80GB SXM, A800, H100 SXM, H200 SXM, B200, their NVLink, and the network
cards of a DGX of them; Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x.  A chip of TPU7x is
two devices, which have half of everything; links are what the page gives for both directions, over
the number of links and 2.

A TPU's clock is on no data sheet: it is the peak rate over the FLOPs of a cycle, 2 width^2 per
matrix unit, of which there are 8 (v4, v5p), 4 (v5e, v6e) and 4 per device (TPU7x).  v6e's page
speaks of two, which the compiler's estimates contradict (docs/measurements.md: v6e-matrix-units).
VMEM is as JAX's Pallas has it (``tpu_info.py``).

Nor are the rows that hide latching.  They are read from what libtpu's compiler schedules for a loop
of products (docs/measurements.md: tpu-latching).  TPU7x needs fewer, and v4's VMEM is too small for
attention that streams 64 rows: both count as if rows were filled up to the unit."""


def chip_of(device_kind: str) -> Chip | None:
    """Chip of a ``jax.Device.device_kind``; None if it is not in the table (a CPU, say)."""
    # The longest name first: "TPU v5 lite" is not a "TPU v5".
    by_length = sorted(CHIPS.values(), key=lambda chip: len(chip.device_kind), reverse=True)
    return next((chip for chip in by_length if chip.device_kind in device_kind), None)
