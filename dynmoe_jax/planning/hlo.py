"""Reads an optimised HLO module: its matrix products, how often they run, what they cost.

The text is what ``jax.jit(f).lower(...).compile().as_text()`` returns.  XLA for TPU writes matrix
products as convolutions, and Pallas kernels as custom calls that hide what they compute; both are
counted here.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

Shape = tuple[int, ...]

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b[a-z]+[0-9]*[a-z0-9]*\[([0-9,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,)]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**63 - 1
_GROUPED_KERNEL = re.compile(r"(?<![a-z])t?gmm(?![a-z])|ragged-dot|ragged_dot")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: e.g. ``"dot"``, ``"fusion"``, ``"custom-call"``.
      shapes: of the result; several if it is a tuple.
      operands: names.
      text: everything after the equals sign.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs."""
        branches = _BRANCHES.search(self.text)
        listed = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.text), *listed)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where there is none, as of Pallas kernels."""
        found = _CYCLES.search(self.text)
        return int(found[1]) if found and int(found[1]) != _UNKNOWN_CYCLES else None


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product of the module.

    Attributes:
      name: of the instruction.
      kind: ``"dot"``, ``"convolution"`` or ``"kernel"``.
      operands: shapes of the two sides.
      result: shape of the result.
      times: how often it runs at most; every branch of a conditional counts.
      flops: of one run, a multiply-add is two.
    """

    name: str
    kind: str
    operands: tuple[Shape, Shape]
    result: Shape
    times: int
    flops: float


class Module:
    """A parsed module."""

    def __init__(self, text: str):
        """Parses ``text``.

        Raises:
          ValueError: it has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = None
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = _instruction(found[1], found[2])
        if self.entry is None:
            raise ValueError("The text is not an HLO module: it has no ENTRY computation.")
        self._times = dict.fromkeys(self.computations, 0)
        self._count(self.entry, 1)

    def _count(self, computation: str, times: int) -> None:
        self._times[computation] += times
        for instruction in self.computations[computation].values():
            trips = _TRIPS.search(instruction.text) if instruction.opcode == "while" else None
            for called in instruction.called:
                self._count(called, times * (int(trips[1]) if trips else 1))

    def instructions(self) -> Iterator[tuple[int, str, Instruction]]:
        """(times it runs, computation, instruction) of all that runs.

        A loop whose trip count is not known counts once.
        """
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                if self._times[computation]:
                    yield self._times[computation], computation, instruction

    def products(self) -> list[Product]:
        """Dots, convolutions and kernels of grouped products."""
        found = []
        for times, computation, instruction in self.instructions():
            kind = _product_kind(instruction)
            if kind:
                found.append(self._product(kind, times, computation, instruction))
        return found

    def _product(self, kind, times, computation, instruction) -> Product:
        known = self.computations[computation]
        shapes = [known[name].shapes[0] for name in instruction.operands if name in known]
        # A kernel's metadata come first: groups, tiles, offsets.
        sides = (shapes[-2], shapes[-1]) if kind == "kernel" else (shapes[0], shapes[1])
        result = instruction.shapes[0]
        flops = _FLOPS[kind](sides, result, instruction.text)
        return Product(instruction.name, kind, sides, result, times, flops)

    def flops(self) -> float:
        """Of all products, as often as they run."""
        return sum(product.times * product.flops for product in self.products())

    def largest_array(self) -> int:
        """Elements of the largest array that an instruction makes, within fusions too."""
        return max(math.prod(s) for _, _, i in self.instructions() for s in i.shapes)

    def cycles(self) -> tuple[int, int]:
        """(sum of the compiler's estimates, how many kernels are not in it).

        Of instructions of loops and of the entry, not of what is fused into them.
        """
        total, missing = 0, 0
        for times, _, instruction in self.instructions():
            total += times * (instruction.cycles or 0)
            missing += is_kernel(instruction)
        return total, missing


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel on TPU."""
    return 'custom_call_target="tpu_custom_call"' in instruction.text


def _instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    head, tail = text[: opcode.start()], text[opcode.end() :]
    # Layouts in braces nest parentheses, operands do not: they end at the first one that closes.
    operands = re.findall(r"%([^\s,)]+)", tail[: tail.index(")")])
    shapes = tuple(_shape(dims) for dims in _ARRAY.findall(head))
    return Instruction(name, opcode[1], shapes or ((),), tuple(operands), text)


def _shape(dimensions: str) -> Shape:
    return tuple(int(d) for d in dimensions.split(",") if d)


def _product_kind(instruction: Instruction) -> str | None:
    if instruction.opcode in ("dot", "convolution"):
        return instruction.opcode
    # A kernel that only prepares metadata makes no matrix.
    if not is_kernel(instruction) or len(instruction.shapes[0]) < 2:
        return None
    source = re.search(r'op_name="([^"]*)"', instruction.text)
    names = f"{instruction.name} {source[1] if source else ''}"
    return "kernel" if _GROUPED_KERNEL.search(names) else None


def _dot_flops(sides, result, text) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", text)
    dimensions = _shape(contracted[1]) if contracted else ()
    return 2.0 * math.prod(result) * math.prod(sides[0][d] for d in dimensions)


def _kernel_flops(sides, result, text) -> float:
    """[R, I] x [E, I, O] (or [E, O, I]) -> [R, O], or [R, I], [R, O] -> [E, I, O]."""
    left, _ = sides
    if len(result) == 3:
        return 2.0 * left[0] * result[1] * result[2]
    return 2.0 * left[0] * left[1] * result[1]


def _convolution_flops(sides, result, text) -> float:
    """2 * results * inputs that each has: features, and the window's places inside the input."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text).groups()
    window = _window(text)
    pairs = 1
    for d in range(len(out) - 2):
        size, kernel = sides[0][left.index(str(d))], sides[1][right.index(str(d))]
        pairs *= _places(size, kernel, result[out.index(str(d))], window, d)
    # The kernel's input features are those of one feature group already.
    features = sides[1][right.index("i")]
    return 2.0 * result[out.index("b")] * result[out.index("f")] * pairs * features


def _window(text: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    return {name: value.split("x") for name, value in fields.items()}


def _places(size: int, kernel: int, out: int, window: dict[str, list[str]], d: int) -> int:
    """Pairs (place in the result, place in the kernel) that meet an input along one dimension."""

    def field(name, default):
        return window[name][d] if name in window else default

    stride, dilate = int(field("stride", 1)), int(field("rhs_dilate", 1))
    spread, low = int(field("lhs_dilate", 1)), int(str(field("pad", "0_0")).split("_")[0])
    at = (o * stride + k * dilate - low for o in range(out) for k in range(kernel))
    return sum(a >= 0 and a % spread == 0 and a // spread < size for a in at)


_FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops, "kernel": _kernel_flops}
