"""Expert compute over a device mesh.

Axis legend: T tokens, S tokens that arrive at a device, K slots per token, D model width, F hidden
width of an expert.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from dynmoe_jax.experts.backend import Backend
from dynmoe_jax.experts.kinds.kind import Arrays
from dynmoe_jax.experts.parallel.transport import Transport
from dynmoe_jax.experts.rows import rows_from_slots, slots_of
from dynmoe_jax.experts.weights import ExpertWeights
from dynmoe_jax.mesh.axes import (
    BATCH,
    EXPERT,
    MODEL,
    axes_of,
    mesh_axes_at,
    mesh_sizes,
    on_one_device,
    parameter_spec,
)
from dynmoe_jax.mesh.collectives import (
    GATHERED,
    each_device,
    gathered,
    gathered_experts,
    gathered_halves,
    sum_over,
)
from dynmoe_jax.routing import Routing

RowBound = Callable[[int, int], int]
"""(T, T K) -> R: most rows of T tokens, given how many slots they have."""


def all_rows(tokens: int, slots: int) -> int:
    """The bound of a routing that keeps to none."""
    return slots


def apply_experts(
    x_TD: Float[Array, "T D"],
    routing: Routing,
    weights: ExpertWeights | Arrays,
    backend: Backend,
    row_bound: RowBound = all_rows,
    transport: Transport | None = None,
    splits_hidden: bool = True,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """Sends every token to its experts and combines what they return.

    Under a mesh (``jax.set_mesh``) all of it is one ``jax.shard_map``.  The batch axes split the
    tokens.  A device puts its E / expert experts together from the devices of its ``data`` axis,
    with the F / model hidden units that are its own; tokens travel along the ``expert`` axis, and
    partial results are summed along ``model``.

    Args:
      x_TD: tokens.
      routing: their routing.
      weights: all experts; arrays by the names of their parameters, which say how they lie, if
        kernels do not know the kind.
      backend: expert compute.
      row_bound: most rows of the tokens of a device, which the routing keeps to.
      transport: between devices that have different experts; needed if the mesh has such.
      splits_hidden: whether ``model`` may split hidden units; otherwise its devices put whole
        experts together, and all of them compute the same.

    Returns:
      y_TD, and the number of rows dropped over all devices.
    """
    if on_one_device():
        return _local(x_TD, routing, weights, backend, row_bound)
    sizes = mesh_sizes()
    arrays, remade = _by_name(weights)
    specs = {name: parameter_spec(name, array.shape, sizes) for name, array in arrays.items()}

    def on_each_device(x_TD, routing, arrays):
        together = in_part if splits_hidden else in_full
        weights = remade({name: together(name, arrays[name], specs[name]) for name in arrays})
        y_TD, dropped = _local(x_TD, routing, weights, backend, row_bound, sizes[EXPERT], transport)
        if sizes[MODEL] > 1 and splits_hidden:
            y_TD = sum_over(y_TD, MODEL)
        return y_TD, jax.lax.psum(dropped, BATCH)

    apply = each_device(on_each_device, (P(BATCH), P(BATCH), specs), (P(BATCH), P()))
    return apply(x_TD, routing, arrays)


def _by_name(weights: ExpertWeights | Arrays) -> tuple[dict[str, Array], Callable]:
    """(arrays by the names of their parameters, what makes weights of such arrays again)."""
    if not isinstance(weights, ExpertWeights):
        return dict(weights), dict
    arrays = {"gate_up_ED2F": weights.gate_up_ED2F, "down_EFD": weights.down_EFD}
    return arrays, lambda arrays: ExpertWeights(**arrays)


def in_part(name: str, part: Array, spec: P) -> Array:
    """A parameter of this device's own experts, with the F / model hidden units of its own."""
    axes, spec = axes_of(name), P(None, *spec[1:])
    if axes[-2:] == ["D", "2F"]:
        return gathered_halves(part, spec)
    # All but the first axis: each device keeps its own experts.
    return gathered_experts(part, spec) if axes == ["E", "F", "D"] else gathered(part, spec)


def in_full(name: str, part: Array, spec: P) -> Array:
    """A parameter of this device's own experts, whole: along ``model`` all compute the same."""
    for dimension in range(1, len(spec)):
        if axes := mesh_axes_at(spec, dimension):
            part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return checkpoint_name(part, GATHERED)


def _local(
    x_TD, routing, weights, backend, row_bound, devices=1, transport=None
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """(y_TD, rows dropped) of the tokens of one device, with experts on several ``devices``."""
    tokens, most = routing.expert_TK.shape[0], routing.most_rows or routing.expert_TK.size
    bound, slots = row_bound(tokens, min(most, routing.expert_TK.size)), slots_of(routing)

    def compute(x_SD, slots):
        # All tokens of all devices may choose the experts of this one.
        most = min(slots.expert_TK.size, devices * bound)
        rows = rows_from_slots(slots, most)
        share = x_TD.shape[0] / x_SD.shape[0]
        return backend(x_SD, dataclasses.replace(rows, share=share), weights)

    return compute(x_TD, slots) if devices == 1 else transport(x_TD, slots, compute)
