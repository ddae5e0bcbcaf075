"""Plays the schedule that the compiler wrote, and takes the time.

The rule.  A TPU runs the instructions of a computation in their order.  Where the compiler
estimates cycles, that is their time; a Pallas kernel takes the roofline of its shapes
(:mod:`dynmoe_jax.planning.tpu.kernels`); a gather of rows, which the compiler estimates at next to
nothing, and what it does not estimate at all, take at least the time of their bytes through main
memory.  An asynchronous collective runs beside what stands between its start and its end, one at a
time along each set of mesh axes; where it is not done by then, or where a collective is
synchronous, the device waits.  Copies between a chip's two memories that are asynchronous cost
nothing.  So

    step time = compute time + collective time that nothing hides.
"""

import collections
import dataclasses
import math
import re

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.collectives import Network, Transfer, kind_of
from dynmoe_jax.planning.hlo.instruction import Instruction
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.planning.tpu.kernels import kernel_cost

_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "opt-barrier"}
    | {"after-all", "partition-id", "replica-id"}
    | {f"{name}-{end}" for name in ("copy", "slice", "call", "async") for end in ("start", "done")}
)
_UNKNOWN = ("sort", "scatter")
_FUSED_START = 'custom_call_target="AsyncCollectiveStart"'
_FUSED_END = 'custom_call_target="AsyncCollectiveDone"'
_STEPS = 8
"""Number of instructions back that the start of an asynchronous collective is looked for."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the schedule.

    Attributes:
      name: of the instruction.
      module: the function of the package that it comes from.
      what: its opcode, kernel or kind of collective.
      times: runs in one step.
      seconds: of one run.
      cycles: the compiler's estimate of one run; None where there is none.
    """

    name: str
    module: str
    what: str
    times: int
    seconds: float
    cycles: int | None = None

    @property
    def total(self) -> float:
        """Seconds in one step."""
        return self.times * self.seconds


@dataclasses.dataclass
class Played:
    """Time that a run of a computation took.

    Attributes:
      compute: seconds of everything but collectives.
      waited: seconds that the device waited for collectives.
    """

    compute: float = 0.0
    waited: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.waited


class Schedule:
    """The usual step of a compiled module, played on a chip.

    Args:
      module: compiled for a TPU.
      chip: what it runs on.
      network: between the devices.
      rows: expected number of used rows of one expert layer on one device.

    Attributes:
      operations: of compute.
      transfers: collectives, (times in a step, transfer, operation).
      unknown: operations whose time is not known and not counted.
      played: the whole step.
    """

    def __init__(self, module: Module, chip: Chip, network: Network, rows: float):
        self._module, self._chip, self._network, self._rows = module, chip, network, rows
        self.operations: list[Operation] = []
        self.transfers: list[tuple[int, Transfer, Operation]] = []
        self.unknown: list[Operation] = []
        self.played = self._play(module.entry, 1)

    def _play(self, computation: str, times: int) -> Played:
        now, played = 0.0, Played()
        free: dict[str, float] = collections.defaultdict(float)
        ends: dict[str, float] = {}
        for instruction in self._module.computations[computation].values():
            started = self._starts(instruction)
            if started is not None:
                transfer = self._network.transfer(started)
                self._record_transfer(transfer, instruction, started, times)
                end = max(now, free[transfer.axes]) + transfer.seconds
                free[transfer.axes] = end
                if self._is_asynchronous(instruction):
                    ends[instruction.name] = end
                    continue
                wait = end - now
            elif self._ends(instruction, ends):
                start = self._start_of(instruction, computation, ends)
                wait = max(0.0, ends.pop(start) - now) if start else 0.0
            else:
                spent = self._compute(instruction, computation, times)
                now += spent.seconds
                played.compute += spent.compute
                played.waited += spent.waited
                continue
            now += wait
            played.waited += wait
        return played

    def _compute(self, instruction: Instruction, computation: str, times: int) -> Played:
        if instruction.opcode in ("while", "conditional", "call"):
            return self._inner(instruction, times)
        if instruction.opcode in _FREE:
            return Played()
        seconds = self._seconds(instruction, computation)
        operation = self._operation(instruction, computation, times, seconds or 0.0)
        if seconds is None:
            self.unknown.append(operation)
        elif seconds:
            self.operations.append(operation)
        return Played(compute=seconds or 0.0)

    def _inner(self, instruction: Instruction, times: int) -> Played:
        rounds = self._module.rounds(instruction, usual=True)
        if not rounds:
            return Played()
        played = [
            self._play(called, times * rounds)
            for called in self._module.branches(instruction, usual=True)
        ]
        return Played(
            rounds * sum(p.compute for p in played), rounds * sum(p.waited for p in played)
        )

    def _seconds(self, instruction: Instruction, computation: str) -> float | None:
        if instruction.is_kernel:
            known = self._module.computations[computation]
            operands = [known[name] for name in instruction.operands if name in known]
            return kernel_cost(instruction, operands, self._rows, self._chip).seconds(self._chip)
        if instruction.opcode == "custom-call":
            return 0.0
        if instruction.cycles is None and math.prod(instruction.shapes[0]) <= 1:
            return 0.0  # counters of loops, and their comparisons
        if instruction.opcode in _UNKNOWN:
            return None
        seconds = (instruction.cycles or 0) / self._chip.clock_hz
        if instruction.cycles is None or self._gathers(instruction):
            # Read and written.
            moved = 2 * instruction.main_memory_bytes
            if instruction.opcode == "dynamic-update-slice":
                moved = 0
            seconds = max(seconds, moved / self._chip.bytes_per_s)
        return seconds

    def _gathers(self, instruction: Instruction) -> bool:
        inside = (self._module.computations[c].values() for c in instruction.called)
        return instruction.opcode == "gather" or (
            instruction.opcode == "fusion" and any(i.opcode == "gather" for c in inside for i in c)
        )

    def _operation(self, instruction, computation, times, seconds) -> Operation:
        return Operation(
            instruction.name,
            self._module.source_of(computation, instruction),
            _what(instruction),
            times,
            seconds,
            instruction.cycles,
        )

    def _record_transfer(self, transfer, instruction, started, times) -> None:
        module = self._module.sources.module(started.frame)
        module = module or self._module.sources.module(instruction.frame)
        operation = Operation(instruction.name, module, transfer.kind, times, transfer.seconds)
        self.transfers.append((times, transfer, operation))

    def _starts(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, or starts; None if it is something else."""
        if kind_of(instruction):
            return instruction
        # A call of another core of the chip (sparse cores), or a part of a fusion with products.
        calls = instruction.opcode in ("call-start", "async-start")
        fuses = instruction.opcode == "fusion" and self._contains(instruction, _FUSED_START)
        return self._collective_in(instruction) if calls or fuses else None

    def _collective_in(self, instruction: Instruction) -> Instruction | None:
        for called in instruction.called:
            for inner in self._module.computations[called].values():
                if found := inner if kind_of(inner) else self._collective_in(inner):
                    return found
        return None

    def _contains(self, instruction: Instruction, text: str) -> bool:
        inside = (self._module.computations[c].values() for c in instruction.called)
        return any(text in i.text for c in inside for i in c)

    def _is_asynchronous(self, instruction: Instruction) -> bool:
        return instruction.opcode.endswith("-start") or instruction.opcode == "fusion"

    def _ends(self, instruction: Instruction, ends: dict[str, float]) -> bool:
        """Whether an instruction is the end of a collective that was started."""
        if instruction.opcode == "fusion":
            return self._contains(instruction, _FUSED_END)
        # Copies end in the same way, and calls that are no collectives.
        return instruction.opcode.endswith("-done") and not ends.keys().isdisjoint(
            instruction.operands
        )

    def _start_of(self, instruction, computation: str, ends: dict[str, float]) -> str | None:
        """The name of the collective that ends here: the nearest one before it in its operands."""
        known, names = self._module.computations[computation], list(instruction.operands)
        for _ in range(_STEPS):
            if found := next((name for name in names if name in ends), None):
                return found
            names = [o for name in names if name in known for o in known[name].operands]
        return None


def _what(instruction: Instruction) -> str:
    if not instruction.is_kernel:
        return re.sub(r"[._]?\d+$", "", instruction.name) or instruction.opcode
    return f"kernel {re.sub(r'[._][0-9]+$', '', instruction.name)}"
