"""What expert compute costs, from the rows really used: FLOPs, bytes, and the time they need.

The only home of what chips can do; training metrics and benchmarks read it here.

Axis legend: T tokens, R rows ((token, expert) pairs), D model width, F hidden width of an expert.
"""

import dataclasses


def expert_flops(rows: float, width: int, hidden_width: int) -> float:
    """FLOPs of the forward pass of SwiGLU experts: gate, up and down for each row.

    Args:
      rows: (token, expert) pairs computed.
      width: D.
      hidden_width: F.
    """
    return 6.0 * rows * width * hidden_width


def expert_weight_bytes(experts: int, width: int, hidden_width: int, itemsize: int = 4) -> int:
    """Bytes of the three matrices of some experts.

    Args:
      experts: how many, for traffic those with at least one row.
      width: D.
      hidden_width: F.
      itemsize: bytes of one number.
    """
    return 3 * experts * width * hidden_width * itemsize


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device can do at best, from the data sheet of its chip.

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
      vmem_bytes: fast memory of each core of a TPU.
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
speaks of two; the compiler of libtpu 0.0.42 estimates 2.98e6 cycles for a product of 8192^3, where
two would need 4.19e6.  Fast memory is as JAX's Pallas has it (``tpu_info.py``).

Nor are the rows that hide latching.  They are read from what that compiler schedules for a loop of
products [M, 512] x [512, 512]: one more product of 64 rows takes 254 cycles on v5p and v5e, where
its FLOPs take 256, and 145 on v6e, where they take 64; 145 is what 144 rows would take.  The more
rows, the less: 182 for 128, 274 for 256.  On TPU7x 64 rows take half as long as 256, and 256 no
longer than their FLOPs; v4's fast memory is too small for attention that streams 64 rows.  Both
count as if rows were filled up to the unit."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of ``jax.Device.device_kind``; None if it is not in the table (a CPU, say)."""
    # The longest name first: "TPU v5 lite" is not a "TPU v5".
    by_length = sorted(CHIPS.values(), key=lambda chip: len(chip.device_kind), reverse=True)
    return next((chip for chip in by_length if chip.device_kind in device_kind), None)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What the expert compute of one layer costs at the least.

    Attributes:
      flops: of the rows used.
      bytes: through main memory, if every operand passes once: the weights of the experts used,
        and the rows; forward + backward also reads the weights again and writes their gradients.
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def roofline_s(self, chip: Chip) -> float:
        """Seconds on a chip that either computes or moves bytes at its best rate."""
        return max(self.flops / chip.flops_per_s, self.bytes / chip.bytes_per_s)


def layer_cost(
    rows: float,
    experts: int,
    width: int,
    hidden_width: int,
    *,
    backward: bool = False,
    itemsize: int = 2,
) -> LayerCost:
    """Cost of the forward pass of one layer, or of forward and backward together.

    Args:
      rows: (token, expert) pairs computed.
      experts: experts with at least one row.
      width: D.
      hidden_width: F.
      backward: count the backward pass as well.
      itemsize: bytes of one number.
    """
    flops = expert_flops(rows, width, hidden_width)
    weights = expert_weight_bytes(experts, width, hidden_width, itemsize)
    # Forward reads x and writes y; backward reads x and dy, writes dx.
    row_bytes = rows * width * itemsize
    if backward:
        return LayerCost(3 * flops, 3 * weights + 5 * row_bytes)
    return LayerCost(flops, weights + 2 * row_bytes)


def layer_peak_bytes(
    tokens: int,
    saved_rows: int,
    experts: int,
    width: int,
    hidden_width: int,
    *,
    backward: bool = False,
    itemsize: int = 2,
) -> int:
    """Bytes that one layer holds at its peak, besides the block or tile it is working on.

    All experts' weights, and the tokens in and out; with backward also the weights' gradients,
    the tokens' gradients in and out, and gate and up activations of the rows that are saved.

    Args:
      tokens: T.
      saved_rows: rows that keep their activations (0 without backward).
      experts: E, all of them.
      width: D.
      hidden_width: F.
      backward: forward and backward together.
      itemsize: bytes of one number; weight gradients are added up in float32.
    """
    weights = expert_weight_bytes(experts, width, hidden_width, itemsize)
    row_bytes = 2 * tokens * width * itemsize
    if not backward:
        return weights + row_bytes
    gradients = expert_weight_bytes(experts, width, hidden_width, 4)
    saved = 2 * saved_rows * hidden_width * itemsize
    return weights + gradients + 2 * row_bytes + saved
