"""What expert compute costs, from the rows really used: FLOPs, bytes, and the time they need.

Axis legend: R rows ((token, expert) pairs), D model width, F hidden width of an expert.
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
    """

    flops_per_s: float
    bytes_per_s: float


CHIPS = {
    "a100": Chip(312e12, 2.04e12),
    "a800": Chip(312e12, 2.04e12),
    "h100": Chip(989e12, 3.35e12),
    "h200": Chip(989e12, 4.8e12),
    "v5e": Chip(197e12, 0.82e12),
    "v5p": Chip(459e12, 2.77e12),
    "v6e": Chip(918e12, 1.64e12),
}
"""Data sheets: NVIDIA A100 80GB SXM, A800, H100 SXM, H200 SXM; Google Cloud TPU v5e, v5p, v6e."""


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
