"""Roofline of a step compiled for a GPU: every operation by its FLOPs or its bytes.

XLA for GPU estimates no times.  But it says what runs, and what each operation reads and writes: an
operation takes its products at the peak rate, or its bytes through main memory, whichever is
longer.  Collectives are not counted here.

Axis legend: R rows of a grouped product, E experts, D model width, F hidden width of an expert, B
batch, L positions, H heads, W head width.
"""

import dataclasses
import re
from collections.abc import Sequence

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.instruction import Instruction, Shape
from dynmoe_jax.planning.hlo.matmuls import Product, product_of
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.planning.hlo.schedule import Operation

_FREE = (
    "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "while", "conditional",
    "call", "optimization-barrier", "after-all", "iota", "partition-id", "replica-id",
)  # fmt: skip
_COLLECTIVE = re.compile(r"^(?:all-|reduce-scatter|ragged-all-to-all|collective-|async-)")
_ATTENTION = re.compile(
    r"attention_(?:forward|to_keys|to_queries)|__cudnn\$fmha[A-Za-z]*Backward|__cudnn\$fmha"
)
_ATTENTION_PRODUCTS = {
    "attention_forward": (2, 0),
    "attention_to_keys": (3, 1),
    "attention_to_queries": (1, 2),
    "__cudnn$fmha": (2, 0),
}
"""Products of scores or of as many numbers: for the first time, and again."""
_BACKWARD_OF_CUDNN = (4, 1)
_GROUPED = re.compile(r"grouped_[a-z_]+")
_SLICES = ("dynamic-slice", "gather")
_FUSIONS = ("fusion", "fusion-start")
"""XLA of JAX 0.11 starts those that write into a stack, and computes on until their end."""
_ENDS = "-done"
_PASSES_ON = ("bitcast", "reshape", "convert")


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of one run of an operation, those computed again apart, and bytes it moves."""

    flops: float
    recomputed: float
    bytes: float

    def seconds(self, chip: Chip) -> float:
        """By the roofline of a chip."""
        return max((self.flops + self.recomputed) / chip.flops_per_s, self.bytes / chip.bytes_per_s)


class GpuRoofline:
    """The operations of a step and their cost.

    Attributes:
      operations: of compute.
      flops: of products that compute something for the first time.
      recomputed: of those that backward runs again.
    """

    def __init__(self, module: Module, chip: Chip, rows: float):
        """Counts them.

        Args:
          module: compiled for a GPU.
          chip: which one.
          rows: that the tokens of a microbatch use, on one device.
        """
        self._module, self._rows = module, rows
        self.operations: list[Operation] = []
        self.flops = self.recomputed = 0.0
        scheduled = set(module.scheduled())
        for times, computation, instruction in module.instructions(usual=True):
            if computation not in scheduled or _costs_nothing(instruction.opcode):
                continue
            cost = self._cost(computation, instruction)
            self.flops += times * cost.flops
            self.recomputed += times * cost.recomputed
            self.operations.append(
                Operation(
                    instruction.name,
                    module.source_of(computation, instruction),
                    _what(instruction),
                    times,
                    cost.seconds(chip),
                )
            )

    def _cost(self, computation: str, instruction: Instruction) -> Cost:
        moved = self._moved(computation, instruction)
        if found := _attention(instruction):
            shapes = self._module.operand_shapes(computation, instruction)
            products = _ATTENTION_PRODUCTS.get(found, _BACKWARD_OF_CUDNN)
            first, again = (n * _pairs(shapes) for n in products)
            return self._cost_of(instruction, first, again, moved)
        if instruction.is_kernel:
            return self._grouped_cost(computation, instruction, moved)
        inner = [(computation, instruction)]
        inner += [(c, i) for c in instruction.called for i in self._module.computations[c].values()]
        found = (product_of(i, self._module.operand_shapes(c, i), 1) for c, i in inner)
        flops = sum(product.flops for product in found if product)
        return self._cost_of(instruction, flops, 0.0, moved)

    def _cost_of(self, instruction: Instruction, flops: float, again: float, moved: float) -> Cost:
        if "rematted_computation" in instruction.op_name:
            flops, again = 0.0, flops + again
        return Cost(flops, again, moved)

    def _grouped_cost(self, computation: str, instruction: Instruction, moved: float) -> Cost:
        """At the rows used, where there is room for more."""
        shapes = self._module.operand_shapes(computation, instruction)
        product = product_of(instruction, shapes, 1)
        if product is None:
            return Cost(0.0, 0.0, moved)
        used = min(1.0, self._rows / product.rows)
        arrays = self._arrays(computation, instruction)
        weights = sum(size for size, shape in arrays if len(shape) > 2)
        moved = weights + used * (moved - weights)
        flops = used * product.flops
        if _computes_again(instruction, product):
            return Cost(0.0, flops, moved)
        return self._cost_of(instruction, flops, 0.0, moved)

    def _arrays(self, computation: str, instruction: Instruction):
        """(bytes, shape) of all that it reads and writes, whole."""
        known = self._module.computations[computation]
        for each in (*(known[n] for n in instruction.operands if n in known), instruction):
            yield from zip(each.sizes, each.shapes, strict=False)

    def _moved(self, computation: str, instruction: Instruction) -> float:
        known = self._module.computations[computation]
        operands = [known[name] for name in instruction.operands if name in known]
        if instruction.opcode == "dynamic-update-slice":
            return 2.0 * sum(operands[1].sizes)
        if instruction.opcode not in _FUSIONS:
            return float(sum(sum(o.sizes) for o in operands) + sum(instruction.sizes))
        return self._moved_by_fusion(instruction, operands)

    def _moved_by_fusion(self, instruction: Instruction, operands: list[Instruction]) -> float:
        """A fusion reads slices of what it slices, and writes slices into what it updates."""
        called = instruction.called[0]
        inside = self._module.computations[called]
        parameters = {_number(i): i for i in inside.values() if i.opcode == "parameter"}
        moved, updated = 0.0, 0
        for number, operand in enumerate(operands):
            users = list(_users(inside, parameters[number].name))
            if users and all(u.opcode in _SLICES and at == 0 for u, at in users):
                moved += sum(sum(u.sizes) for u, _ in users)
            elif any(u.opcode == "dynamic-update-slice" and at == 0 for u, at in users):
                updated += sum(operand.sizes)
            else:
                moved += sum(operand.sizes)
        written = sum(inside[self._module.roots[called]].sizes) - updated
        if updated:
            updates = [i for i in inside.values() if i.opcode == "dynamic-update-slice"]
            written += sum(sum(inside[u.operands[1]].sizes) for u in updates)
        return moved + max(0.0, written)


def _costs_nothing(opcode: str) -> bool:
    """Whether it moves no bytes, or between devices, or waits for what was counted at its start."""
    return opcode in _FREE or opcode.endswith(_ENDS) or _COLLECTIVE.match(opcode) is not None


def _users(computation: dict[str, Instruction], name: str):
    """(instruction, which operand) of all that read an array, whatever it is called between."""
    for instruction in computation.values():
        if name in instruction.operands:
            if instruction.opcode in _PASSES_ON:
                yield from _users(computation, instruction.name)
            else:
                yield instruction, instruction.operands.index(name)


def _number(parameter: Instruction) -> int:
    return int(re.search(r"parameter\((\d+)\)", parameter.text)[1])


def _computes_again(instruction: Instruction, product: Product) -> bool:
    """Whether it is gate and up for backward.

    There all other products of rows are fused, or with transposed matrices.
    """
    forward = product.operands[1][-2:] == (product.operands[0][1], product.result[-1])
    names = "transpose(" in instruction.op_name and "grouped_product" in instruction.op_name
    return names and forward


def _attention(instruction: Instruction) -> str:
    """The kernel of attention that an instruction is; empty for anything else."""
    if instruction.opcode != "custom-call":
        return ""
    found = _ATTENTION.search(f"{instruction.op_name} {instruction.text}")
    return found[0] if found else ""


def _pairs(shapes: Sequence[Shape]) -> float:
    """FLOPs of one product over the pairs of positions that attend: about a half of all."""
    batch, length, heads, width = next(shape for shape in shapes if len(shape) == 4)
    return 2.0 * batch * heads * length * length / 2 * width


def _what(instruction: Instruction) -> str:
    if attention := _attention(instruction):
        return f"kernel {attention}"
    if instruction.is_kernel:
        found = _GROUPED.search(instruction.op_name)
        return f"kernel {found[0]}" if found else "kernel"
    return instruction.op_name.rsplit("/", 1)[-1] or instruction.opcode
