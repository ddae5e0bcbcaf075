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
    """What a chip can do at best, from its data sheet.

    Attributes:
      flops_per_s: dense bfloat16 matrix products.
      bytes_per_s: main memory.
      device_kind: what ``jax.Device.device_kind`` of such a chip contains.
    """

    flops_per_s: float
    bytes_per_s: float
    device_kind: str = ""


CHIPS = {
    "a100": Chip(312e12, 2.04e12, "A100"),
    "a800": Chip(312e12, 2.04e12, "A800"),
    "h100": Chip(989e12, 3.35e12, "H100"),
    "h200": Chip(989e12, 4.8e12, "H200"),
    "b200": Chip(2250e12, 8.0e12, "B200"),
    "v4": Chip(275e12, 1.23e12, "TPU v4"),
    "v5e": Chip(197e12, 0.82e12, "TPU v5 lite"),
    "v5p": Chip(459e12, 2.77e12, "TPU v5"),
    "v6e": Chip(918e12, 1.64e12, "TPU v6 lite"),
}
"""Data sheets: NVIDIA A100 80GB SXM, A800, H100 SXM, H200 SXM, B200; Google Cloud TPU v4, v5e, v5p,
v6e."""


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
