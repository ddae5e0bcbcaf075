"""One line of optimised HLO: what it makes, of what, by which line of the program."""

import dataclasses
import functools
import math
import re

Shape = tuple[int, ...]

_OPCODE = re.compile(r"\s([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%([^\s,){}]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**63 - 1
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_KERNEL = re.compile(
    r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|triton_kernel_call_ffi)"'
)
_FAST_MEMORY = re.compile(r"S\([1-9]\d*\)")


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

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, the branches of a conditional in order."""
        branches = _BRANCHES.search(self.text)
        listed = re.findall(r"%([^\s,]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.text), *listed)

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where there is none, as of Pallas kernels."""
        found = _CYCLES.search(self.text)
        return int(found[1]) if found and int(found[1]) != _UNKNOWN_CYCLES else None

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each array of the result, without what tiles add."""
        return tuple(_bytes(kind, dims) for kind, dims, _ in _ARRAY.findall(self._head))

    @functools.cached_property
    def main_memory_bytes(self) -> int:
        """Bytes of the result that lie in main memory, not in a chip's fast one."""
        return sum(
            _bytes(kind, dims)
            for kind, dims, layout in _ARRAY.findall(self._head)
            if not _FAST_MEMORY.search(layout)
        )

    @property
    def _head(self) -> str:
        return self.text[: _OPCODE.search(self.text).start()]

    @property
    def op_name(self) -> str:
        """The path of JAX's transformations and functions that it comes from; may be empty."""
        found = _OP_NAME.search(self.text)
        return found[1] if found else ""

    @property
    def frame(self) -> int | None:
        """Its entry in the module's table of stack frames."""
        found = _FRAME.search(self.text)
        return int(found[1]) if found else None

    @property
    def index(self) -> int | None:
        """Index of a ``get-tuple-element``."""
        found = _INDEX.search(self.text) if self.opcode == "get-tuple-element" else None
        return int(found[1]) if found else None

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel on TPU or GPU."""
        return _KERNEL.search(self.text) is not None


def parse_instruction(name: str, text: str) -> Instruction:
    """The instruction ``%name = text``."""
    opcode = _OPCODE.search(text)
    head, tail = text[: opcode.start()], text[opcode.end() :]
    # Layouts in braces nest parentheses, operands do not: they end at the first one that closes.
    operands = re.findall(r"%([^\s,)]+)", tail[: tail.index(")")])
    shapes = tuple(dimensions(dims) for _, dims, _ in _ARRAY.findall(head))
    return Instruction(name, opcode[1], shapes or ((),), tuple(operands), text)


def dimensions(text: str) -> Shape:
    """``"8,128"`` as (8, 128)."""
    return tuple(int(d) for d in text.split(",") if d)


def _bytes(kind: str, dims: str) -> int:
    """Bytes of an array of a type such as ``bf16``, ``s32`` or ``pred``."""
    bits = re.search(r"\d+", kind)
    return math.ceil(math.prod(dimensions(dims)) * (int(bits[0]) if bits else 8) / 8)
