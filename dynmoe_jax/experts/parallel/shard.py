"""Expert compute over a device mesh.

Axis legend: T tokens, S tokens that arrive at a device, K slots per token, D model width, F hidden
width of an expert.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.backend import Backend
from dynmoe_jax.experts.parallel.transport import Transport
from dynmoe_jax.experts.rows import rows_from_slots, slots_of
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.mesh.axes import BATCH, EXPERT, MODEL, mesh_sizes, on_one_device, parameter_spec
from dynmoe_jax.mesh.collectives import each_device, gathered_experts, gathered_halves, sum_over
from dynmoe_jax.routing import Routing

RowBound = Callable[[int, int], int]
"""(T, T K) -> R: most rows of T tokens, given how many slots they have."""


def all_rows(tokens: int, slots: int) -> int:
    """The bound of a routing that keeps to none."""
    return slots


def apply_experts(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    weights: ExpertWeights,
    backend: Backend,
    row_bound: RowBound = all_rows,
    transport: Transport | None = None,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """Sends every token to its experts and combines what they return.

    Under a mesh (``jax.set_mesh``) all of it is one ``jax.shard_map``.  The batch axes split the
    tokens.  A device puts its E / expert experts together from the devices of its ``data`` axis,
    with the F / model hidden units that are its own; tokens travel along the ``expert`` axis, and
    partial results are summed along ``model``.

    Args:
      x_TD: tokens.
      routing: their routing.
      weights: all experts.
      backend: expert compute.
      row_bound: most rows of the tokens of a device, which the routing keeps to.
      transport: between devices that have different experts; needed if the mesh has such.

    Returns:
      y_TD, and the number of rows dropped over all devices.
    """
    if on_one_device():
        return _local(x_TD, routing, weights, backend, row_bound)
    sizes = mesh_sizes()
    specs = ExpertWeights(
        parameter_spec("gate_up_ED2F", weights.gate_up_ED2F.shape, sizes),
        parameter_spec("down_EFD", weights.down_EFD.shape, sizes),
    )

    def on_each_device(x_TD, routing, weights):
        weights = ExpertWeights(
            gathered_halves(weights.gate_up_ED2F, specs.gate_up_ED2F),
            # All but the first axis: each device keeps its own experts.
            gathered_experts(weights.down_EFD, P(None, *specs.down_EFD[1:])),
        )
        y_TD, dropped = _local(x_TD, routing, weights, backend, row_bound, sizes[EXPERT], transport)
        if sizes[MODEL] > 1:
            y_TD = sum_over(y_TD, MODEL)
        return y_TD, jax.lax.psum(dropped, BATCH)

    apply = each_device(on_each_device, (P(BATCH), P(BATCH), specs), (P(BATCH), P()))
    return apply(x_TD, routing, weights)


def _local(
    x_TD, routing, weights, backend, row_bound, devices=1, transport=None
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """(y_TD, rows dropped) of the tokens of one device, with experts on several ``devices``."""
    bound, slots = row_bound(routing.expert_TK.shape[0], routing.expert_TK.size), slots_of(routing)

    def compute(x_SD, slots):
        # All tokens of all devices may choose the experts of this one.
        most = min(slots.expert_TK.size, devices * bound)
        rows = rows_from_slots(slots, most)
        share = x_TD.shape[0] / x_SD.shape[0]
        return backend(x_SD, dataclasses.replace(rows, share=share), weights)

    return compute(x_TD, slots) if devices == 1 else transport(x_TD, slots, compute)
