"""Plan of a training step on a topology: the figures of a report.

Axis legend: T tokens, L positions, E experts, D model width, F hidden width of an expert.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.planning.hlo.schedule import Operation
from dynmoe_jax.planning.memory import MemoryPlan
from dynmoe_jax.planning.tpu.topology import Topology

MOST_FLOPS = 1.15
"""Compiled FLOPs, recomputation aside, over the analytic count: more means that something is
computed that nobody needs."""


@dataclasses.dataclass(frozen=True)
class FlopsPlan:
    """FLOPs of one device in one step, at the rows used.

    Attributes:
      analytic: of the model, forward and backward, recomputation not counted.
      compiled: of the products in the compiled step that compute something for the first time; None
        where nothing is compiled.
      recomputed: of those that the backward pass runs again (``config.model.remat``).
      rest: of one more chunk of rows in every expert layer, which runs only where tokens use more
        experts than ``config.model.moe.saved_rows_per_token``; not in ``compiled``.
      dense_over_experts: names of products that compute every expert for every row.
    """

    analytic: float
    compiled: float | None
    recomputed: float
    rest: float = 0.0
    dense_over_experts: tuple[str, ...] = ()

    @property
    def ratio(self) -> float | None:
        """Compiled over analytic, recomputation in neither."""
        return None if self.compiled is None else self.compiled / self.analytic


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one device along some mesh axes in one step.

    Attributes:
      axes: joined by ``+``.
      kind: of collective.
      runs: collectives.
      bytes: in all.
      seconds: of all, one after the other.
    """

    axes: str
    kind: str
    runs: int
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TimePlan:
    """Seconds of one step.

    Attributes:
      compute: of everything but collectives.
      collectives: of all of them, one after the other.
      exposed: of collectives, while which the device does nothing else.
      kernels: of Pallas kernels, by their roofline; part of ``compute``.
    """

    compute: float
    collectives: float
    exposed: float
    kernels: float = 0.0

    @property
    def step(self) -> float:
        """All of it."""
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cost of a run.

    Attributes:
      topology: as it was asked for.
      mesh: devices along each axis.
      devices: as JAX counts them.
      chips: how many are rented.
      experts_per_token: that the figures assume.
      microbatches: of a step.
      tokens: of one step.
      steps: of the run.
      peak: FLOP/s of one device.
      memory: bytes of one device.
      flops: of one device; None where nothing could be compiled.
      time: of one step; None where nothing could be compiled.
      traffic: between devices.
      operations: of compute and of collectives, costliest first.
      unknown: operations whose time nobody knows, which is not counted.
      compile_seconds: that compiling took; 0 where nothing was compiled.
      assumptions: sentences to read the figures by.
    """

    topology: str
    mesh: dict[str, int]
    devices: int
    chips: int
    experts_per_token: float
    microbatches: int
    tokens: int
    steps: int
    peak: float
    memory: MemoryPlan
    flops: FlopsPlan | None = None
    time: TimePlan | None = None
    traffic: tuple[Traffic, ...] = ()
    operations: tuple[Operation, ...] = ()
    unknown: tuple[Operation, ...] = ()
    compile_seconds: float = 0.0
    assumptions: tuple[str, ...] = ()

    @property
    def utilisation(self) -> float:
        """Analytic FLOPs over what the devices could do in the time of a step."""
        return self.flops.analytic / self.time.step / self.peak if self.time else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices."""
        return self.tokens / self.time.step if self.time else math.nan

    @property
    def days(self) -> float:
        """Days of the whole run, without evaluation, checkpoints and failures."""
        return self.steps * self.time.step / 86400 if self.time else math.nan

    @property
    def chip_hours(self) -> float:
        """Chip hours of the whole run."""
        return 24 * self.days * self.chips

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        figures = {
            name: getattr(self, name)
            for name in ("utilisation", "tokens_per_second", "days", "chip_hours")
        }
        known = {name: value for name, value in figures.items() if math.isfinite(value)}
        found = dataclasses.asdict(self) | known
        found["memory"] |= {"total": self.memory.total, "fits": self.memory.fits}
        if self.time and self.flops:
            found["time"]["step"] = self.time.step
            found["flops"]["ratio"] = self.flops.ratio
        return found


def expected_experts(moe: config.MoE, asked: float | None) -> float:
    """Mean experts of a token: what was asked for, else the one to expect of the router.

    Raises:
      ConfigError: there cannot be so few or so many.
    """
    if not moe.every_n_layers:
        return 0.0
    if asked is None:
        return moe.route.bounds(moe.num_experts).expected
    if not 0 < asked <= moe.num_experts:
        raise config.ConfigError(
            f"--experts_per_token={asked:g} must be above 0 and at most "
            f"config.model.moe.num_experts={moe.num_experts}."
        )
    return asked


def new_plan(
    cfg: config.Config, topology: Topology, mesh: dict[str, int], experts: float, **found: Any
) -> Plan:
    """A plan with the figures that settings and topology tell."""
    return Plan(
        topology=topology.name,
        mesh=mesh,
        devices=topology.devices,
        chips=topology.chips,
        experts_per_token=experts,
        microbatches=cfg.train.microbatches,
        tokens=cfg.train.batch_size * cfg.data.seq_len,
        steps=cfg.train.steps,
        peak=topology.chip.flops_per_s,
        **found,
    )


def analytic_flops(cfg: config.Config, experts: float, devices: int) -> float:
    """FLOPs of one device in one step, if tokens use so many experts."""
    tokens = cfg.train.batch_size * cfg.data.seq_len
    rows = tokens * experts * cfg.model.num_moe_layers
    return training_flops(cfg.model, tokens, cfg.data.seq_len, rows) / devices


def traffic_of(transfers: Sequence) -> tuple[Traffic, ...]:
    """Collectives of a step, summed by axes and kind, most seconds first."""
    found: dict[tuple[str, str], Traffic] = {}
    for times, transfer, _ in transfers:
        key = transfer.axes, transfer.kind
        before = found.get(key, Traffic(*key, 0, 0.0, 0.0))
        found[key] = Traffic(
            *key,
            before.runs + times,
            before.bytes + times * transfer.bytes,
            before.seconds + times * transfer.seconds,
        )
    return tuple(sorted(found.values(), key=lambda traffic: -traffic.seconds))
