"""Bytes of one device by kind, and what would make a step fit."""

import dataclasses
import math
from typing import Any

import jax

from dynmoe_jax import config
from dynmoe_jax.planning.compile import CompiledStep
from dynmoe_jax.planning.hlo.instruction import Instruction
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.training.health.memory import Need, advice
from dynmoe_jax.training.step import TrainState

_ROOM = 0.95
_PASSES_ON = ("bitcast", "copy", "copy-start", "copy-done", "convert", "get-tuple-element")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a step takes on one device.

    Attributes:
      parameters: the share of the device, float32.
      optimizer: moments and counters.
      activations: what the forward pass of the layers keeps for the backward pass.
      temporaries: gradients, parameters put together for a layer, logits, work space.
      other: the batch, and what tiles add to the arrays of the state.
      limit: bytes that a device has.
      remedy: what would make it fit; empty if it fits.
    """

    parameters: int
    optimizer: int
    activations: int
    temporaries: int
    other: int
    limit: int
    remedy: str = ""

    @property
    def total(self) -> int:
        """All kinds."""
        kinds = (self.parameters, self.optimizer, self.activations, self.temporaries, self.other)
        return sum(kinds)

    @property
    def fits(self) -> bool:
        """Whether a device has as much."""
        return not self.remedy and self.total <= self.limit


def memory_plan(
    cfg: config.Config, state: TrainState, step: CompiledStep, limit: float, batch_devices: int
) -> MemoryPlan:
    """The bytes of a step that the compiler found room for.

    Args:
      cfg: all settings.
      state: shapes with their shardings.
      step: compiled.
      limit: bytes that a device has.
      batch_devices: devices that share the batch.
    """
    parameters, optimizer = shard_bytes(state.params), shard_bytes(state.optimizer)
    plan = step.plan
    # The new state takes the place of the old one.
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    activations = min(saved_activations(step.module), plan.temp_size_in_bytes)
    found = MemoryPlan(
        parameters,
        optimizer,
        activations,
        plan.temp_size_in_bytes - activations,
        max(0, plan.argument_size_in_bytes - parameters - optimizer) + new,
        int(limit),
    )
    if found.total <= limit:
        return found
    return dataclasses.replace(found, remedy=remedy(cfg, found, batch_devices))


def memory_too_large(
    cfg: config.Config, state: TrainState, needed: int, limit: float, batch_devices: int
) -> MemoryPlan:
    """The bytes of a step that the compiler refused, as far as it said what it needs."""
    parameters, optimizer = shard_bytes(state.params), shard_bytes(state.optimizer)
    found = MemoryPlan(parameters, optimizer, 0, needed, 0, int(limit))
    return dataclasses.replace(found, remedy=remedy(cfg, found, batch_devices))


def remedy(cfg: config.Config, plan: MemoryPlan, batch_devices: int) -> str:
    """Advises what would make a step fit."""
    state = plan.parameters + plan.optimizer
    need = Need(state, plan.parameters, max(0, plan.total - state - plan.parameters))
    if state + plan.parameters > _ROOM * plan.limit:
        times = math.ceil((state + plan.parameters) / (_ROOM * plan.limit))
        return (
            f"parameters, gradients and optimizer need {times} times as many devices along "
            "config.mesh.data, config.mesh.expert or config.mesh.model"
        )
    if not need.activations:  # the compiler refused, and did not say how much was missing
        return f"raise config.train.microbatches from {cfg.train.microbatches}"
    return advice(need, plan.limit, cfg, batch_devices)


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's share of arrays that know their sharding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def saved_activations(module: Module) -> int:
    """Bytes that loops of the forward pass write and loops of the backward pass read.

    Layers are scanned, forward and backward, so what is kept for backward is what the backward
    loop reads of the results of the forward loop, other than what passes it unchanged.
    """
    return sum(
        _saved_in(module, module.computations[name]) for name in dict.fromkeys(module.scheduled())
    )


def _saved_in(module: Module, computation: dict[str, Instruction]) -> int:
    loops = [i for i in computation.values() if i.opcode == "while"]
    backward = [i for i in loops if "transpose(" in i.op_name]
    saved: dict[tuple[str, int], int] = {}
    for loop in backward:
        for name in computation[loop.operands[0]].operands:
            origin = _origin(computation, name)
            if origin is None:
                continue
            source = computation[origin.operands[0]]
            if source in loops and source not in backward and _changes(module, source, origin):
                saved[source.name, origin.index] = source.sizes[origin.index]
    return sum(saved.values())


def _origin(computation: dict[str, Instruction], name: str) -> Instruction | None:
    """The element of a loop's result that an array is, moved and cast perhaps."""
    while name in computation and computation[name].opcode in _PASSES_ON:
        instruction = computation[name]
        source = computation.get(instruction.operands[0])
        if instruction.opcode == "get-tuple-element" and source and source.opcode == "while":
            return instruction
        name = instruction.operands[0]
    return None


def _changes(module: Module, loop: Instruction, element: Instruction) -> bool:
    """Whether a loop's body returns something else for an element than what it was given."""
    body = next(c for c in loop.called if f"body=%{c}" in loop.text)
    inside = module.computations[body]
    returned = inside[inside[module.roots[body]].operands[element.index]]
    return not (returned.opcode == "get-tuple-element" and returned.index == element.index)
