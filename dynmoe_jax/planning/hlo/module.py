"""Reads an optimised HLO module: what runs, how often, and where it comes from.

The text is what ``jax.jit(f).lower(...).compile().as_text()`` returns.

Loops are multiplied out.  XLA for CPU writes a loop's trip count down; for TPU it is the constant
that the loop's condition compares its counter with.

Two things are decided by data: how often a loop runs whose bound is no constant, and which branch a
conditional takes.  Either everything is counted once ("at most" would be more for such a loop), or
what is *usual*: the shortest branch, and no round of such a loop.  That is how this project's
experts treat rows beyond the usual number (``experts/kernels/grouped.py``).
"""

import collections
import re
from collections.abc import Iterator

from dynmoe_jax.planning.hlo.instruction import Instruction, Shape, parse_instruction
from dynmoe_jax.planning.hlo.matmuls import Product, product_of
from dynmoe_jax.planning.hlo.sources import Sources

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^[su](?:8|16|32|64)\[\]\S* constant\((\d+)\)")
_SCHEDULED = ("while", "conditional", "call")
"""Operations that run computations whose instructions are scheduled one by one, not fused or
applied."""


class Module:
    """A parsed module.

    Attributes:
      computations: instructions by computation and name, in the order of the schedule.
      roots: name of the instruction that each computation returns.
      entry: name of the computation that runs first.
      sources: which function of the program an instruction comes from.
    """

    def __init__(self, text: str):
        """Parses ``text``.

        Raises:
          ValueError: it has no entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.entry = ""
        self._read(text)
        if not self.entry:
            raise ValueError("The text is not an HLO module: it has no ENTRY computation.")
        self.sources = Sources(text)
        self._times = {usual: self._count(usual) for usual in (False, True)}

    def _read(self, text: str) -> None:
        name, lines = "", {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                name = header[2]
                lines[name] = {}
                self.entry = name if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                lines[name][found[2]] = found[3]
                if found[1]:
                    self.roots[name] = found[2]
            elif line and line != "}" and name and lines[name]:
                # Metadata of kernels hold line breaks.
                lines[name][next(reversed(lines[name]))] += line
        for name, found in lines.items():
            self.computations[name] = {n: parse_instruction(n, text) for n, text in found.items()}

    def _count(self, usual: bool) -> dict[str, int]:
        times = collections.Counter()

        def visit(computation: str, count: int) -> None:
            times[computation] += count
            for instruction in self.computations[computation].values():
                trips = self.rounds(instruction, usual)
                for called in self.branches(instruction, usual):
                    visit(called, count * trips)

        visit(self.entry, 1)
        return times

    def branches(self, instruction: Instruction, usual: bool) -> tuple[str, ...]:
        """The computations that it runs; of a conditional's only the shortest if ``usual``."""
        if usual and instruction.opcode == "conditional":
            return (min(instruction.called, key=self._length),)
        return instruction.called

    def _length(self, computation: str) -> int:
        """Instructions of a computation and of all that it runs."""
        instructions = self.computations[computation].values()
        return len(instructions) + sum(self._length(c) for i in instructions for c in i.called)

    def rounds(self, instruction: Instruction, usual: bool) -> int:
        """Number of times that what an instruction calls runs for one run of it."""
        trips = self.trip_count(instruction)
        if instruction.opcode != "while" or trips is not None:
            return 1 if trips is None else trips
        return 0 if usual else 1

    def trip_count(self, instruction: Instruction) -> int | None:
        """Number of times that a loop runs its body; None if it is no loop, or data decide."""
        if instruction.opcode != "while":
            return None
        if known := _TRIPS.search(instruction.text):
            return int(known[1])
        condition = re.search(r"\bcondition=%([^\s,)]+)", instruction.text)
        return self._bound(condition[1]) if condition else None

    def _bound(self, condition: str) -> int | None:
        """The one integer that a condition compares with."""
        inside = [condition]
        inside += [c for i in self.computations[condition].values() for c in i.called]
        found = {
            int(constant[1])
            for computation in inside
            for instruction in self.computations[computation].values()
            if (constant := _CONSTANT.match(instruction.text))
        }
        return found.pop() if len(found) == 1 else None

    def instructions(self, usual: bool = False) -> Iterator[tuple[int, str, Instruction]]:
        """(times it runs, computation, instruction) of all that runs.

        Args:
          usual: count what is usual, see above; otherwise everything.
        """
        times = self._times[usual]
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                if times[computation]:
                    yield times[computation], computation, instruction

    def scheduled(self, computation: str = "", usual: bool = True) -> Iterator[str]:
        """Computations whose instructions are scheduled one by one: entry, loops, branches."""
        computation = computation or self.entry
        yield computation
        for instruction in self.computations[computation].values():
            if instruction.opcode in _SCHEDULED:
                for called in self.branches(instruction, usual):
                    yield from self.scheduled(called, usual)

    def source_of(self, computation: str, instruction: Instruction) -> str:
        """The function that it comes from, or what is fused into it, or what it reads."""
        if found := self.sources.module(instruction.frame):
            return found
        for called in instruction.called:
            for inner in reversed(self.computations[called].values()):
                if found := self.sources.module(inner.frame):
                    return found
        known = self.computations[computation]
        for name in instruction.operands:
            if name in known and (found := self.sources.module(known[name].frame)):
                return found
        return ""

    def operand_shapes(self, computation: str, instruction: Instruction) -> list[Shape]:
        """First shapes of the operands."""
        known = self.computations[computation]
        return [known[name].shapes[0] for name in instruction.operands if name in known]

    def products(self, usual: bool = False) -> list[Product]:
        """Dots, convolutions and kernels of grouped products."""
        found = (
            product_of(i, self.operand_shapes(computation, i), times)
            for times, computation, i in self.instructions(usual)
        )
        return [product for product in found if product]

    def flops(self, usual: bool = False) -> float:
        """FLOPs of all products, as often as they run."""
        return sum(product.times * product.flops for product in self.products(usual))

    def cycles(self) -> tuple[int, int]:
        """(sum of the compiler's estimates, how many kernels are not in it).

        Of instructions of loops and of the entry, not of what is fused into them.
        """
        total, missing = 0, 0
        for times, _, instruction in self.instructions():
            total += times * (instruction.cycles or 0)
            missing += instruction.is_kernel
        return total, missing
