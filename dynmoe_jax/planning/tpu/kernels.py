"""Cost of Pallas kernels, of which the compiler says nothing: a roofline of their own shapes.

Kernels of grouped products visit the rows used alone, so they are counted at those and not at the
static bound.  Attention kernels are counted by the blocks that a causal mask leaves.

Axis legend: R rows, E experts, I and O the inner and outer width of a product, B batch, H heads, L
positions, W head width.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

from dynmoe_jax.experts.kernels.tpu.weight_gradient_tiling import block_rows
from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.model.kernels.attention.flat_kernels import SUM_ROWS
from dynmoe_jax.planning.hlo.instruction import Instruction, Shape
from dynmoe_jax.planning.hlo.matmuls import fused_products, product_kind, product_of

_BLOCK = r'\\"{name}\\": (\d+)'
_FLAT_PRODUCTS = {
    "flat_attention_forward": (1, 1, SUM_ROWS),
    "flat_attention_backward": (2, 3, 0),
}
"""Products that contract W, those that stream W rows, and further rows of these: scores and values;
scores and dprobs, dquery, dkey and dvalue."""
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"')
_ATTENTION = re.compile(r"splash_mha_(fwd|dq|dkv)|flat_attention_(?:forward|backward)")
_PROJECTION = re.compile(r"projection_(?:forward|backward)")
_LOGITS = re.compile(r"logit_(sums|gradients)")
_WEIGHT_GRADIENT = re.compile(r"(?<![a-z])tgmm(?![a-z])")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Products of scores' size in each Splash kernel: scores and values; scores, their gradient and dq;
scores, their gradient, dk and dv."""
_BLOCKS = {"fwd": ("block_q", "block_kv"), "dq": ("block_q_dq", "block_kv_dq")}
_BLOCKS["dkv"] = ("block_q_dkv", "block_kv_dkv")


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Cost of one run of a kernel.

    Attributes:
      flops: of its products.
      busy_flops: what its matrix units spend on them: with tiles that two groups share computed
        twice, and narrow operands filled up to the units' width.
      bytes: through main memory, if every operand passes once.
      recomputed: of ``flops``, those that forward has computed before.
    """

    flops: float
    busy_flops: float
    bytes: float
    recomputed: float = 0.0

    def seconds(self, chip: Chip) -> float:
        """The time of a chip that either computes or moves bytes at its best rate."""
        return max(self.busy_flops / chip.flops_per_s, self.bytes / chip.bytes_per_s)


def kernel_cost(
    instruction: Instruction, operands: Sequence[Instruction], rows: float, chip: Chip
) -> KernelCost:
    """The cost of one run of a Pallas kernel.

    Args:
      instruction: the kernel.
      operands: what makes its operands.
      rows: expected number of used rows of a grouped product.
      chip: what it runs on.
    """
    # An operand may be given twice, when a kernel reads two parts of it.
    arrays = {id(o): o for o in operands}.values()
    moved = float(sum(instruction.sizes) + sum(size for o in arrays for size in o.sizes))
    shapes = [o.shapes[0] for o in operands]
    if product_kind(instruction) == "kernel":
        return _grouped(instruction, operands, moved, rows, chip)
    if attention_part(instruction).startswith("flat"):
        return _flat(instruction, operands, moved, chip)
    if attention_part(instruction):
        flops = attention_flops(instruction, shapes)
        width = shapes[2][-1]
        return KernelCost(flops, flops * _filled(width, chip) / width, moved)
    if found := _COST.search(instruction.text):
        flops = float(found[1])
        # The gradients take the logits again, and one product that is new.
        recomputed = flops / 2 if logits_part(instruction) == "gradients" else 0.0
        return KernelCost(flops, flops, float(found[2]), recomputed)
    return KernelCost(0.0, 0.0, moved)


def _grouped(instruction, operands, moved, rows: float, chip: Chip) -> KernelCost:
    shapes = [o.shapes[0] for o in operands]
    product = product_of(instruction, shapes, 1)
    bound = product.rows
    used = min(float(bound), rows)
    experts, shared = _shared_rows(shapes, bound)
    if _WEIGHT_GRADIENT.search(f"{instruction.name} {instruction.op_name}"):
        shared = min(shared, block_rows(bound, experts))
    visited = min(used + (experts - 1) * shared, float(bound))
    # Rows beyond those used are neither read nor written; weights are, all of them.
    arrays = [*zip(shapes, (o.sizes[0] for o in operands), strict=True)]
    arrays += zip(instruction.shapes, instruction.sizes, strict=True)
    moved -= sum(size for shape, size in arrays if bound in shape[:2]) * (1 - used / bound)
    inner, outer = product.operands[0][1], product.flops / (2 * bound * product.operands[0][1])
    filled = _filled(inner, chip) * _filled(outer, chip) / (inner * outer)
    per_row = product.flops / bound
    recomputed = 2 / 3 * per_row * used if fused_products(instruction) == 3 else 0.0
    return KernelCost(per_row * used, per_row * visited * filled, moved, recomputed)


def _flat(instruction, operands: Sequence[Instruction], moved, chip: Chip) -> KernelCost:
    """FLOPs are what the kernel says; the shapes say how many heads share a block of lanes.

    A matrix unit holds one operand and streams the rows of the other through it.  A contraction of
    W uses W of the unit's rows, so it is filled up.  W rows that stream past an operand that fills
    the unit lose nothing, but for the time that it takes to latch that operand.
    """
    flops = float(_COST.search(instruction.text)[1])
    shapes = [shape for of in (*operands, instruction) for shape in of.shapes]
    blocks, side_by_side = next(shape for shape in shapes if len(shape) == 4)[1:3]
    width = instruction.shapes[0][-1] / (blocks * side_by_side)
    contracted, streamed, further = _FLAT_PRODUCTS[attention_part(instruction)]
    filled = contracted * _filled(width, chip) + streamed * max(width + further, chip.latch_rows)
    return KernelCost(flops, flops * filled / ((contracted + streamed) * width), moved)


def _shared_rows(shapes: list[Shape], bound: int) -> tuple[int, float]:
    """(experts, rows that two of them compute, because a tile of them belongs to both).

    Megablox lists its tiles' groups: as many as there are tiles, and one for every further expert.
    """
    groups = next((s[0] - 1 for s in shapes if len(s) == 1), 1)
    visits = max((s[0] for s in shapes if len(s) == 1), default=0)
    tiles = visits - groups + 1
    return groups, bound / tiles if groups > 1 and tiles > 0 else 0.0


def _filled(width: float, chip: Chip) -> float:
    return math.ceil(width / chip.product_width) * chip.product_width


def attention_part(instruction: Instruction) -> str:
    """Part of attention that a kernel computes; empty for anything else.

    ``"fwd"``, ``"dq"`` or ``"dkv"`` of Splash, ``"flat_attention_forward"`` or ``"..._backward"``.
    """
    found = _ATTENTION.search(f"{instruction.name} {instruction.op_name}")
    return (found[1] or found[0]) if found and instruction.is_kernel else ""


def is_projection(instruction: Instruction) -> bool:
    """Whether an instruction is a kernel of :mod:`dynmoe_jax.model.kernels.norm.qkv_projection`."""
    names = f"{instruction.name} {instruction.op_name}"
    return instruction.is_kernel and _PROJECTION.search(names) is not None


def logits_part(instruction: Instruction) -> str:
    """``"sums"`` or ``"gradients"`` of :mod:`dynmoe_jax.model.kernels.cross_entropy.tpu`, or
    empty."""
    found = _LOGITS.search(f"{instruction.name} {instruction.op_name}")
    return found[1] if found and instruction.is_kernel else ""


def attention_flops(instruction: Instruction, shapes: Sequence[Shape]) -> float:
    """FLOPs of a Splash kernel under a causal mask: whole blocks, those on the diagonal included.

    Args:
      instruction: the kernel.
      shapes: of its operands; queries are the first with three dimensions that end in [L, W].
    """
    part = attention_part(instruction)
    query = next(s for s in shapes[2:] if len(s) >= 3)
    length, width = query[-2:]
    rows, columns = (_block(instruction, name, length) for name in _BLOCKS[part])
    blocks = sum(math.ceil((i + 1) * rows / columns) for i in range(math.ceil(length / rows)))
    products = _PRODUCTS[part] + (part == "dkv" and _fused(instruction))
    return 2.0 * products * math.prod(query[:-2]) * blocks * rows * columns * width


def _block(instruction: Instruction, name: str, length: int) -> int:
    found = re.search(_BLOCK.format(name=name), instruction.text)
    return min(int(found[1]), length) if found else length


def _fused(instruction: Instruction) -> bool:
    return r"\"use_fused_bwd_kernel\": true" in instruction.text
