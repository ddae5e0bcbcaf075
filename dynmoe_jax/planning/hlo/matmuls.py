"""Matrix products of an HLO module, and what they cost.

XLA for TPU writes matrix products as convolutions, and Pallas kernels as custom calls that hide
what they compute; both are counted here.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from dynmoe_jax.experts.kernels.swiglu import BACKWARD, FORWARD, KEPT_BACKWARD
from dynmoe_jax.planning.hlo.instruction import Instruction, Shape, dimensions

_GROUPED_KERNEL = re.compile(
    r"(?<![a-z])t?gmm(?![a-z])|ragged-dot|ragged_dot"
    r"|grouped_(?:swiglu|hidden_gradient|product|weight_gradient)"
)
_FUSED_PRODUCTS = {FORWARD: 2, BACKWARD: 3, KEPT_BACKWARD: 1}
"""Products of D with F in the kernels that fuse SwiGLU: gate and up; with them the gradient of what
is hidden; this alone."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of the module.

    Attributes:
      name: of the instruction.
      kind: ``"dot"``, ``"convolution"`` or ``"kernel"``.
      operands: shapes of the two sides.
      result: shape of the result.
      times: how often it runs.
      flops: of one run, a multiply-add is two.
      op_name: where it comes from.
    """

    name: str
    kind: str
    operands: tuple[Shape, Shape]
    result: Shape
    times: int
    flops: float
    op_name: str = ""

    @property
    def rows(self) -> int:
        """R of a grouped product, used or not."""
        return self.operands[0][0]

    @property
    def recomputes(self) -> bool:
        """Whether it runs again in the backward pass what ran in the forward pass (``remat``)."""
        return "rematted_computation" in self.op_name


def product_kind(instruction: Instruction) -> str | None:
    """``"dot"``, ``"convolution"``, ``"kernel"`` (of grouped products); None of anything else."""
    if instruction.opcode in ("dot", "convolution"):
        return instruction.opcode
    # A kernel that only prepares metadata makes no matrix.
    if not instruction.is_kernel or len(instruction.shapes[0]) < 2:
        return None
    names = f"{instruction.name} {instruction.op_name}"
    return "kernel" if _GROUPED_KERNEL.search(names) else None


def product_of(instruction: Instruction, shapes: Sequence[Shape], times: int) -> Product | None:
    """The product that an instruction is; None if it is something else.

    Args:
      instruction: any.
      shapes: of its operands.
      times: how often it runs.
    """
    kind = product_kind(instruction)
    if kind is None:
        return None
    result = instruction.shapes[0]
    if fused := fused_products(instruction):
        sides = next(s for s in shapes if len(s) == 2), next(s for s in shapes if len(s) == 3)
        flops = 2.0 * fused * math.prod(result) * sides[0][1]
    else:
        # A kernel's metadata come first: groups, tiles, offsets.
        sides = (shapes[-2], shapes[-1]) if kind == "kernel" else (shapes[0], shapes[1])
        flops = _FLOPS[kind](sides, result, instruction.text)
    return Product(instruction.name, kind, sides, result, times, flops, instruction.op_name)


def fused_products(instruction: Instruction) -> int:
    """Products of one width that a kernel which fuses SwiGLU computes; 0 of anything else."""
    pattern = rf"{BACKWARD}|{FORWARD}|{KEPT_BACKWARD}"
    found = re.search(pattern, f"{instruction.name} {instruction.op_name}")
    return _FUSED_PRODUCTS[found[0]] if found and instruction.is_kernel else 0


def _dot_flops(sides, result, text) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", text)
    contracted = dimensions(contracted[1]) if contracted else ()
    return 2.0 * math.prod(result) * math.prod(sides[0][d] for d in contracted)


def _kernel_flops(sides, result, text) -> float:
    """[R, I] x [E, I, O] (or [E, O, I]) -> [R, O], or [R, I], [R, O] -> [E, I, O]."""
    left, _ = sides
    if len(result) == 3:
        return 2.0 * left[0] * result[1] * result[2]
    return 2.0 * left[0] * left[1] * result[1]


def _convolution_flops(sides, result, text) -> float:
    """2 * results * inputs that each has: features, and the window's positions inside the input."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    window = _window(text)
    pairs = 1
    for d in range(len(out) - 2):
        size, kernel = sides[0][left.index(str(d))], sides[1][right.index(str(d))]
        pairs *= _meeting_pairs(size, kernel, result[out.index(str(d))], window, d)
    # The kernel's input features are those of one feature group already.
    features = sides[1][right.index("i")]
    return 2.0 * result[out.index("b")] * result[out.index("f")] * pairs * features


def _window(text: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    return {name: value.split("x") for name, value in fields.items()}


def _meeting_pairs(size: int, kernel: int, out: int, window: dict[str, list[str]], d: int) -> int:
    """Pairs (position in the result, one in the kernel) that meet an input along one dimension."""

    def field(name, default):
        return window[name][d] if name in window else default

    stride, dilate = int(field("stride", 1)), int(field("rhs_dilate", 1))
    spread, low = int(field("lhs_dilate", 1)), int(str(field("pad", "0_0")).split("_")[0])
    at = (o * stride + k * dilate - low for o in range(out) for k in range(kernel))
    return sum(a >= 0 and a % spread == 0 and a // spread < size for a in at)


_FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops, "kernel": _kernel_flops}
