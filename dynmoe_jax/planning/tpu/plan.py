"""A plan from what the compiler makes of the step, for TPUs.

Axis legend: E experts, D model width, F hidden width of an expert.
"""

import math

from jax.sharding import Mesh

from dynmoe_jax import config
from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.compile import TooLarge, compile_step, state_shapes
from dynmoe_jax.planning.hlo.collectives import Network
from dynmoe_jax.planning.hlo.dense import dense_over_experts
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.planning.hlo.schedule import Schedule
from dynmoe_jax.planning.memory import memory_plan, memory_too_large
from dynmoe_jax.planning.plan import FlopsPlan, Plan, TimePlan, analytic_flops, new_plan, traffic_of
from dynmoe_jax.planning.tpu.kernels import attention_part, is_projection, kernel_cost, logits_part
from dynmoe_jax.planning.tpu.topology import Topology

BATCH_AXES = ("slice", "data", "expert")
_LISTED = 10
_ASSUMPTIONS = (
    "Compute by the compiler's own cycles; Pallas kernels, of which it says nothing, by the "
    "roofline of their shapes at the rows used.",
    "Step time = compute + collectives that nothing hides, played in the compiler's schedule at "
    "the full rate of the links.",
    "Utilisation = analytic FLOPs (forward and backward, no recomputation) over peak x step time.",
)


def plan_on_tpu(cfg: config.Config, topology: Topology, mesh: Mesh, experts: float) -> Plan:
    """Compiles the step for a mesh and takes its figures.

    Args:
      cfg: all settings.
      topology: what the mesh is made of.
      mesh: of described devices.
      experts: mean experts of a token.
    """
    chip, sizes = topology.chip, dict(mesh.shape)
    batch_devices = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    state = state_shapes(cfg, mesh)
    try:
        step = compile_step(cfg, mesh)
    except TooLarge as error:
        memory = memory_too_large(cfg, state, error.needed, chip.memory_bytes, batch_devices)
        return new_plan(cfg, topology, sizes, experts, memory=memory)
    tokens = cfg.train.batch_size * cfg.data.seq_len / cfg.train.microbatches
    rows = experts * tokens / batch_devices
    schedule = Schedule(step.module, chip, Network(mesh, chip), rows)
    costly = [*schedule.operations, *(operation for _, _, operation in schedule.transfers)]
    return new_plan(
        cfg,
        topology,
        sizes,
        experts,
        memory=memory_plan(cfg, state, step, chip.memory_bytes, batch_devices),
        flops=_flops(cfg, step.module, chip, rows, experts, sizes),
        time=_time(schedule),
        traffic=traffic_of(schedule.transfers),
        operations=tuple(sorted(costly, key=lambda operation: -operation.total)[:_LISTED]),
        unknown=tuple(schedule.unknown),
        compile_seconds=step.seconds,
        assumptions=_ASSUMPTIONS,
    )


def _time(schedule: Schedule) -> TimePlan:
    kernels = sum(o.total for o in schedule.operations if o.what.startswith("kernel "))
    collectives = sum(times * transfer.seconds for times, transfer, _ in schedule.transfers)
    return TimePlan(schedule.played.compute, collectives, schedule.played.waited, kernels)


def _flops(
    cfg: config.Config,
    module: Module,
    chip: Chip,
    rows: float,
    experts: float,
    sizes: dict[str, int],
) -> FlopsPlan:
    found = {False: 0.0, True: 0.0}
    grouped = {p.name for p in module.products() if p.kind == "kernel"}
    for product in module.products(usual=True):
        if product.kind != "kernel":
            found[product.recomputes] += product.times * product.flops
    for times, computation, instruction in module.instructions(usual=True):
        counts = attention_part(instruction) or logits_part(instruction)
        if instruction.name in grouped or counts or is_projection(instruction):
            known = module.computations[computation]
            operands = [known[name] for name in instruction.operands]
            cost = kernel_cost(instruction, operands, rows, chip)
            again = "rematted_computation" in instruction.op_name
            found[again] += times * (cost.flops - cost.recomputed)
            found[True] += times * cost.recomputed
    return FlopsPlan(
        analytic=analytic_flops(cfg, experts, math.prod(sizes.values())),
        compiled=found[False],
        recomputed=found[True],
        rest=module.flops() - module.flops(usual=True),
        dense_over_experts=tuple(dense_over_experts(module, cfg.model, sizes)),
    )
