"""A plan for GPUs: a roofline of every operation, or of every part of the model.

By arithmetic nothing is known of what a compiler would add: a part of the model takes the time of
its products at the peak rate or of its bytes through main memory, whichever is longer.  Compiled
(:mod:`.roofline`), the same is counted for every operation.  What travels is arithmetic.

Axis legend: T tokens, L positions, R rows, E experts, D model width, F hidden width, H heads, G
key/value heads, W head width, N layers, V vocabulary.
"""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from dynmoe_jax import config
from dynmoe_jax.experts import ExpertKind, saved_rows_per_token
from dynmoe_jax.experts.layer_cost import SWIGLU, expert_weight_bytes, layer_cost
from dynmoe_jax.mesh.make_mesh import state_shardings
from dynmoe_jax.model.adjugate import adjugates_of, expected_adjugates
from dynmoe_jax.planning.compile import compile_step, state_shapes, with_shardings
from dynmoe_jax.planning.gpu.roofline import GpuRoofline
from dynmoe_jax.planning.hlo.collectives import Transfer
from dynmoe_jax.planning.hlo.dense import dense_over_experts
from dynmoe_jax.planning.hlo.schedule import Operation
from dynmoe_jax.planning.memory import MemoryPlan, memory_plan, remedy, shard_bytes
from dynmoe_jax.planning.plan import FlopsPlan, Plan, TimePlan, analytic_flops, new_plan, traffic_of
from dynmoe_jax.planning.tpu.topology import Topology
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import TrainState, init_state

_BYTES = 2
"""Bytes of a number in the compute type."""
_LISTED = 10
_ARITHMETIC = (
    "Arithmetic, nothing is compiled: every part of the model takes its products at the peak rate "
    "or its bytes through main memory, so a real step takes longer."
)
_COMPILED = (
    "Memory and operations of the compiled step; each takes its products at the peak rate or its "
    "bytes through main memory, so a real step takes longer.  What travels is arithmetic."
)
_ASSUMPTIONS = (
    "Gathers of parameters and sums of gradients run beside compute, as far as it lasts; exchanges "
    "of tokens and sums over config.mesh.model are waited for.",
    "Utilisation = analytic FLOPs (forward and backward, no recomputation) over peak x step time.",
)


def plan_on_gpu(
    cfg: config.Config,
    topology: Topology,
    sizes: dict[str, int],
    experts: float,
    mesh: Mesh | None = None,
) -> Plan:
    """The figures of a step on boxes of GPUs that NVLink joins, and a network between them.

    Args:
      cfg: all settings.
      topology: boxes of GPUs.
      sizes: devices along each mesh axis, outer ones first.
      experts: mean experts of a token.
      mesh: of described devices, to compile the step for; None: by arithmetic.
    """
    step = _Step(cfg, topology, sizes, experts)
    compiled = _compiled(step, mesh) if mesh else None
    operations = compiled.operations if compiled else step.operations()
    transfers = step.transfers()
    compute = sum(operation.total for operation in operations)
    kernels = sum(operation.total for operation in operations if "kernel " in operation.what)
    hidden = sum(n * t.seconds for n, t, _ in transfers if t.axes in ("data", "slice"))
    waited = sum(n * t.seconds for n, t, _ in transfers if t.axes not in ("data", "slice"))
    exposed = waited + max(0.0, hidden - compute)
    costly = [*operations, *(operation for _, _, operation in transfers)]
    analytic = analytic_flops(cfg, experts, topology.devices)
    again = analytic / 3 if cfg.model.remat == "layer" else 0.0
    flops = compiled.flops if compiled else FlopsPlan(analytic, None, again)
    return new_plan(
        cfg,
        topology,
        sizes,
        experts,
        memory=compiled.memory if compiled else step.memory(),
        flops=flops,
        time=TimePlan(compute, hidden + waited, exposed, kernels),
        traffic=traffic_of(transfers),
        operations=tuple(sorted(costly, key=lambda o: -o.total)[:_LISTED]),
        compile_seconds=compiled.seconds if compiled else 0.0,
        assumptions=(_COMPILED if compiled else _ARITHMETIC, *_ASSUMPTIONS),
    )


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """Result of compiling a step."""

    operations: list[Operation]
    memory: MemoryPlan
    flops: FlopsPlan
    seconds: float


def _compiled(step: "_Step", mesh: Mesh) -> _Compiled:
    cfg, chip = step.cfg, step.topology.chip
    compiled = compile_step(cfg, mesh)
    roofline = GpuRoofline(compiled.module, chip, step.experts * step.tokens)
    state = state_shapes(cfg, mesh)
    limit, devices = chip.memory_bytes, step.batch_devices
    module = compiled.module
    flops = FlopsPlan(
        analytic_flops(cfg, step.experts, step.topology.devices),
        roofline.flops,
        roofline.recomputed,
        module.flops() - module.flops(usual=True),
        tuple(dense_over_experts(module, cfg.model, step.sizes)),
    )
    memory = memory_plan(cfg, state, compiled, limit, devices)
    # XLA for GPU unrolls the loops that would tell them apart: the share is that of arithmetic.
    room = memory.activations + memory.temporaries
    kept = min(room, step.memory().activations)
    memory = dataclasses.replace(memory, activations=kept, temporaries=room - kept)
    return _Compiled(roofline.operations, memory, flops, compiled.seconds)


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step on one device."""

    cfg: config.Config
    topology: Topology
    sizes: dict[str, int]
    experts: float

    @property
    def batch_devices(self) -> int:
        """Devices that share the batch."""
        return self.sizes["slice"] * self.sizes["data"] * self.sizes["expert"]

    @property
    def tokens(self) -> float:
        """T of one device in one microbatch."""
        train = self.cfg.train
        return train.batch_size * self.cfg.data.seq_len / train.microbatches / self.batch_devices

    @property
    def passes(self) -> float:
        """Forward passes that forward and backward of a layer cost: recomputing adds one."""
        return 4.0 if self.cfg.model.remat == "layer" else 3.0

    def operations(self) -> list[Operation]:
        """Parts of the model with their time."""
        model, moe, T = self.cfg.model, self.cfg.model.moe, self.tokens
        sparse, tensor = model.num_moe_layers, self.sizes["model"]
        scores = 2 * T * self.cfg.data.seq_len * model.num_heads * model.head_width
        router = 2 * T * model.width * (moe.num_experts + moe.shared_gate)
        of_experts = T * self.experts, moe.num_experts // self.sizes["expert"], moe.hidden_width
        groups = adjugates_of(moe) // self.sizes["expert"]
        of_adjugates = T * expected_adjugates(moe, self.experts), groups, moe.adjugate_width
        shared = "model.feed_forward: MoEFeedForward.shared"
        dense_kind, expert_kind = model.feed_forward_kind, moe.expert_kind
        parts = [
            self._part("model.attention: Attention", "projections", model.num_layers, self._heads),
            self._part("model.attention: Attention", "scores", model.num_layers, scores / tensor),
            self._part(
                "model.kernels.norm.router_logits: norm_and_logits", "router", sparse, router
            ),
            self._feed_forward(
                "model.dense_feed_forward: DenseFeedForward",
                "feed-forward",
                model.num_layers - sparse,
                (T, 1, model.hidden_width),
                dense_kind,
            ),
            self._feed_forward(
                "experts.parallel.shard: apply_experts", "experts", sparse, of_experts, expert_kind
            ),
            self._feed_forward(
                "model.adjugate: AdjugateExperts",
                "adjugate experts",
                sparse,
                of_adjugates,
                expert_kind,
            ),
            self._feed_forward(shared, "shared expert", sparse, (T, 1, moe.shared_hidden_width)),
            self._part(
                "model.kernels.cross_entropy.chunked: cross_entropy_sums",
                "logits",
                1,
                2 * T * model.width * model.vocab_size / tensor,
                3.0,
            ),
        ]
        state = _state_shapes(self.cfg, self.sizes)
        # Parameters and moments are read and written, gradients read.
        moved = 2 * shard_bytes((state.params, state.optimizer)) + shard_bytes(state.params)
        seconds = moved / self.topology.chip.bytes_per_s
        parts.append(Operation("", "training.optimizer: make_optimizer", "update", 1, seconds))
        return [part for part in parts if part.total]

    @property
    def _heads(self) -> float:
        model = self.cfg.model
        width = model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads)
        return 2 * self.tokens * model.width * width / self.sizes["model"]

    def _part(self, module, what, layers, flops, passes=None) -> Operation:
        seconds = (passes or self.passes) * flops / self.topology.chip.flops_per_s
        return Operation("", module, what, layers * self.cfg.train.microbatches, seconds)

    def _feed_forward(
        self, module, what, layers, size: tuple[float, int, int], kind: ExpertKind | None = None
    ) -> Operation:
        """A kind's function, or SwiGLU, of (rows, experts, their hidden width) in some layers."""
        rows, experts, hidden = size
        if not hidden:  # no shared expert
            return Operation("", module, what, 0, 0.0)
        of = rows, experts, self.cfg.model.width, hidden // self.sizes["model"]
        matrices = kind.matrices(self.cfg.model.width, hidden) if kind else SWIGLU
        again = layer_cost(*of, matrices=matrices) if self.passes > 3 else None
        chip = self.topology.chip
        seconds = layer_cost(*of, backward=True, matrices=matrices).roofline_s(chip)
        seconds += again.roofline_s(chip) if again else 0.0
        return Operation("", module, what, layers * self.cfg.train.microbatches, seconds)

    def transfers(self) -> list[tuple[int, Transfer, Operation]]:
        """Transfers of a step: (runs, one run, the same as an operation)."""
        model, parts = self.cfg.model, self.cfg.train.microbatches
        state = _state_shapes(self.cfg, self.sizes)
        mine = shard_bytes(state.params) * self.sizes["data"]
        gathered = mine * _BYTES / 4 / model.num_layers
        stream = self.tokens * model.width * _BYTES
        layers, moe = model.num_layers * parts, model.num_moe_layers * parts
        every = [
            ("data", "all-gather", 2 * layers, gathered),
            ("data", "reduce-scatter", layers, gathered),
            ("slice", "all-reduce", 1, shard_bytes(state.params)),
            ("expert", "all-gather", 2 * moe, stream * self.sizes["expert"]),
            ("expert", "reduce-scatter", 2 * moe, stream * self.sizes["expert"]),
            ("model", "all-reduce", 4 * layers, stream),
        ]
        found = []
        for axis, kind, runs, size in every:
            if self.sizes[axis] > 1 and runs:
                transfer = self._transfer(axis, kind, size)
                operation = Operation("", f"mesh axis {axis}", kind, runs, transfer.seconds)
                found.append((runs, transfer, operation))
        return found

    def _transfer(self, axis: str, kind: str, size: float) -> Transfer:
        """One collective over a mesh axis, of which the inner ones lie within a box."""
        chip, members = self.topology.chip, self.sizes[axis]
        names = list(self.sizes)
        stride = math.prod(self.sizes[name] for name in names[names.index(axis) + 1 :])
        inside = min(members, max(1, self.topology.sizes[-1] // stride))
        boxes = math.ceil(members / inside)
        passes = 2 if kind == "all-reduce" else 1
        seconds = (inside - 1) / inside * size / chip.link_bytes_per_s
        # Each of the devices in a box fetches its part from the other boxes.
        seconds += (boxes - 1) / boxes * size / (inside * chip.network_bytes_per_s)
        return Transfer(kind, axis, passes * (members - 1) / members * size, passes * seconds)

    def _kinds_of_layers(self) -> list[tuple[int, float, int]]:
        """(layers, hidden units that a token keeps, bytes of matrices) of the feed-forwards."""
        model, moe = self.cfg.model, self.cfg.model.moe
        tensor, sparse = self.sizes["model"], model.num_moe_layers

        def in_bytes(experts, hidden, matrices):
            return expert_weight_bytes(experts, model.width, hidden // tensor, _BYTES, matrices)

        here, groups = (n // self.sizes["expert"] for n in (moe.num_experts, adjugates_of(moe)))
        of_expert = moe.expert_kind.matrices(model.width, moe.hidden_width)
        experts = in_bytes(here, moe.hidden_width, of_expert)
        experts += in_bytes(groups, moe.adjugate_width, of_expert)
        experts += in_bytes(1, moe.shared_hidden_width, SWIGLU)
        kept = (saved_rows_per_token(moe) or self.experts) * moe.hidden_width
        kept += expected_adjugates(moe, self.experts) * moe.adjugate_width
        # All matrices but the last make hidden units; a loop over used blocks keeps none.
        kept *= of_expert - 1 if moe.expert_kind.dense is not None else 0
        kept += (SWIGLU - 1) * moe.shared_hidden_width
        of_dense = model.feed_forward_kind.matrices(model.width, model.hidden_width)
        dense = in_bytes(1, model.hidden_width, of_dense)
        kinds = [
            (model.num_layers - sparse, (of_dense - 1) * model.hidden_width, dense),
            (sparse, kept, experts),
        ]
        return [kind for kind in kinds if kind[0]]

    def memory(self) -> MemoryPlan:
        """Bytes by kind: those of the state exact, the others estimated."""
        model, T, tensor = self.cfg.model, self.tokens, self.sizes["model"]
        state = _state_shapes(self.cfg, self.sizes)
        parameters, optimizer = shard_bytes(state.params), shard_bytes(state.optimizer)
        heads = model.head_width * (2 * model.num_heads + 2 * model.num_kv_heads) / tensor
        stream = _BYTES * T * model.width
        kept, layer, weights = 0.0, 0.0, 0.0
        for layers, hidden, matrices in self._kinds_of_layers():
            # Norms' inputs and outputs, the stream between the halves; queries to mixed values;
            # hidden units, gate and up of SwiGLU.
            of_kind = _BYTES * T * (5 * model.width + heads + hidden / tensor)
            kept += layers * (stream if self.cfg.model.remat == "layer" else of_kind)
            layer, weights = max(layer, of_kind), max(weights, matrices)
        logits = 3 * 4 * model.vocab_size / tensor * min(self.cfg.loss.chunk_tokens, T)
        # Gradients, the parameters of a layer and their gradients, and one layer at work.
        work = parameters + 2 * weights + logits + layer
        found = MemoryPlan(
            parameters,
            optimizer,
            int(kept),
            int(work),
            int(4 * 4 * T * self.cfg.train.microbatches),
            int(self.topology.chip.memory_bytes),
        )
        if found.total <= found.limit:
            return found
        return dataclasses.replace(found, remedy=remedy(self.cfg, found, self.batch_devices))


def _state_shapes(cfg: config.Config, sizes: dict[str, int]) -> TrainState:
    """Shapes of the whole state, each with where it lies on a mesh without devices."""
    mesh = AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    shapes = jax.eval_shape(lambda: init_state(cfg, optimizer, jax.random.key(0)))
    return with_shardings(shapes, state_shardings(shapes, mesh))
