"""Plan of a request: which hardware, which mesh, which way of planning."""

import dataclasses
from collections.abc import Callable

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.mesh.make_mesh import check_divides, make_mesh, mesh_shape
from dynmoe_jax.planning.gpu.devices import describe_gpus
from dynmoe_jax.planning.gpu.plan import plan_on_gpu
from dynmoe_jax.planning.plan import Plan, expected_experts
from dynmoe_jax.planning.search import Search, candidate_meshes
from dynmoe_jax.planning.tpu.plan import plan_on_tpu
from dynmoe_jax.planning.tpu.topology import Topology, describe_devices, parse_topology


@dataclasses.dataclass(frozen=True)
class Request:
    """Request for a plan.

    Attributes:
      cfg: all settings.
      topology: name of the hardware.
      experts_per_token: mean experts of a token; None: see :func:`expected_experts`.
      compile: whether to compile for GPUs too; for TPUs it always does.
    """

    cfg: config.Config
    topology: str
    experts_per_token: float | None = None
    compile: bool = False


def plan_run(request: Request) -> Plan:
    """The plan of a run on the mesh of its settings.

    Raises:
      ConfigError: topology, mesh and model do not go together, or layers differ.
    """
    topology = _topology(request)
    planned = _planner(topology, request.compile)
    sizes = mesh_shape(request.cfg.mesh, topology.devices)
    check_divides(request.cfg.model, sizes)
    if not (topology.is_tpu or request.compile):
        return planned(request, sizes)
    with stage(f"Compiling the training step for {topology.name}"):
        return planned(request, sizes)


def search_meshes(request: Request) -> Search:
    """Plans of all meshes of a topology that obey the rules, ranked by step time.

    Raises:
      ConfigError: topology and model do not go together, or no mesh obeys the rules.
    """
    topology = _topology(request)
    planned = _planner(topology, request.compile)
    candidates, refused = candidate_meshes(request.cfg, topology)
    if not candidates:
        reasons = "; ".join(f"{text}: {why}" for text, why in refused.items())
        raise config.ConfigError(f"No mesh of {topology.name} obeys the rules: {reasons}")
    plans = []
    with stage(f"Trying meshes of {topology.name}", len(candidates), "meshes") as progress:
        for sizes in candidates:
            plans.append(planned(request, sizes))
            progress.advance()
    return Search.of(topology.name, plans, refused)


def _topology(request: Request) -> Topology:
    if layers := request.cfg.model.layers:
        raise config.ConfigError(
            f"config.model.layers={layers!r} makes layers differ, of which the planner knows no "
            "figures; leave it empty to plan for equal ones."
        )
    if grow := request.cfg.train.grow:
        raise config.ConfigError(
            f"config.train.grow={grow!r} makes the model larger during the run, and the planner "
            "plans one model; leave it empty, and give the sizes of the step to plan for."
        )
    if steps := request.cfg.model.mask_steps:
        raise config.ConfigError(
            f"config.model.mask_steps={steps} gives the model masks, of which the planner knows no "
            "figures; set it to 0."
        )
    return parse_topology(request.topology, max(1, request.cfg.mesh.slice))


def _planner(topology: Topology, compiled: bool) -> Callable[[Request, dict[str, int]], Plan]:
    devices = None
    if topology.is_tpu:
        devices = describe_devices(topology)
    elif compiled:
        devices = describe_gpus(topology)

    def planned(request, sizes):
        cfg = with_mesh(request.cfg, sizes)
        experts = expected_experts(cfg.model.moe, request.experts_per_token)
        batch = cfg.train.batch_size // cfg.train.microbatches
        mesh = make_mesh(cfg.mesh, batch, devices) if devices else None
        if topology.is_tpu:
            return _noted(plan_on_tpu(cfg, topology, mesh, experts), request)
        return _noted(plan_on_gpu(cfg, topology, sizes, experts, mesh), request)

    return planned


def _noted(plan: Plan, request: Request) -> Plan:
    """The plan, and what it changed of the settings."""
    asked = request.cfg.train.microbatches
    if plan.microbatches == asked:
        return plan
    note = (
        f"config.train.microbatches={asked} leaves devices without a sequence; these are the "
        f"figures of --config.train.microbatches={plan.microbatches}."
    )
    return dataclasses.replace(plan, assumptions=(note, *plan.assumptions))


def with_mesh(cfg: config.Config, sizes: dict[str, int]) -> config.Config:
    """Settings with a mesh, and with no more microbatches than leave each device a sequence.

    The figures then are those of the most microbatches up to the ones set; where none will do,
    the settings stay as they are, for :func:`make_mesh` to refuse.
    """
    batch, parts = cfg.train.batch_size, sizes["slice"] * sizes["data"] * sizes["expert"]
    fitting = (m for m in range(cfg.train.microbatches, 0, -1) if batch % (m * parts) == 0)
    train = dataclasses.replace(cfg.train, microbatches=next(fitting, cfg.train.microbatches))
    return dataclasses.replace(cfg, mesh=config.Mesh(**sizes), train=train)
