"""Cost of expert compute, from the rows really used: FLOPs, bytes, and the time they need.

Axis legend: T tokens, R rows ((token, expert) pairs), D model width, F hidden width of an expert.
"""

import dataclasses

from dynmoe_jax.hardware.chips import Chip

SWIGLU = 3.0
"""Matrices of D x F that SwiGLU multiplies a row by: gate, up and down."""


def expert_flops(rows: float, width: int, hidden_width: int) -> float:
    """FLOPs of the forward pass of SwiGLU experts: gate, up and down for each row.

    Args:
      rows: (token, expert) pairs computed.
      width: D.
      hidden_width: F.
    """
    return 2.0 * SWIGLU * rows * width * hidden_width


def expert_weight_bytes(
    experts: int, width: int, hidden_width: int, itemsize: int = 4, matrices: float = SWIGLU
) -> int:
    """Bytes of the matrices of some experts.

    Args:
      experts: how many, for traffic those with at least one row.
      width: D.
      hidden_width: F.
      itemsize: bytes of one number.
      matrices: of D x F that each has.
    """
    return round(matrices * experts * width * hidden_width * itemsize)


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """FLOPs and traffic that the expert compute of one layer needs at the least.

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
    matrices: float = SWIGLU,
) -> LayerCost:
    """Cost of the forward pass of one layer, or of forward and backward together.

    Args:
      rows: (token, expert) pairs computed.
      experts: experts with at least one row.
      width: D.
      hidden_width: F.
      backward: count the backward pass as well.
      itemsize: bytes of one number.
      matrices: of D x F that each expert has.
    """
    flops = 2.0 * matrices * rows * width * hidden_width
    weights = expert_weight_bytes(experts, width, hidden_width, itemsize, matrices)
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
