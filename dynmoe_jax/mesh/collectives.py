"""Programs that each device runs for itself, and the collectives between devices.

Where a value is whole on several devices, JAX gives each of them its share of the cotangent there:
a sum over the devices is the cotangent of the value.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dynmoe_jax.hardware.target import TPU_TILE_ROWS, current_target
from dynmoe_jax.mesh.axes import MODEL, mesh_axes_at, mesh_sizes

GATHERED = "gathered"
"""Name, for ``jax.checkpoint``, of parameters put together for one layer: none is kept for
backward, which would hold all layers at once."""

COMPUTED_AGAIN = "computed again"
"""Name, within a function with a gradient rule of its own, of a result that is as cheap as
element-wise arithmetic, though a kernel makes it."""


def each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``jax.shard_map`` over all axes of the mesh of the context.

    Without the check of varying axes, which refuses loops that start from plain zeros, as those of
    the expert backends do.  Axes of one device are named in every spec: those that are not named
    would be summed over in backward, in collectives of one device that XLA keeps on CPU.
    """
    alone = tuple(axis for axis, size in mesh_sizes().items() if size == 1)

    def name_alone(spec: P) -> P:
        if not len(spec):
            return spec
        first = mesh_axes_at(spec, 0)
        return P((*first, *(axis for axis in alone if axis not in _named(spec))), *spec[1:])

    in_specs, out_specs = jax.tree.map(name_alone, (in_specs, out_specs))
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _named(spec: P) -> set[str]:
    return {axis for dimension in range(len(spec)) for axis in mesh_axes_at(spec, dimension)}


def gathered(part: Array, spec: P) -> Array:
    """A parameter, put together from the devices that share the batch.

    What the ``model`` axis splits stays split.  Backward scatters the sum of the gradients
    (reduce-scatter), so that no device ever holds the whole sum.

    Args:
      part: what this device keeps.
      spec: how the whole parameter lies on the mesh.
    """
    for dimension in range(len(spec)):
        axes = tuple(axis for axis in mesh_axes_at(spec, dimension) if axis != MODEL)
        if axes:
            part = jax.lax.all_gather(part, axes, axis=dimension, tiled=True)
    return checkpoint_name(part, GATHERED)


def gathered_experts(part: Array, spec: P) -> Array:
    """Experts' [E, F, D], put together from pieces along F.

    A TPU keeps bfloat16 in tiles of 16 rows, and takes a copy to join pieces that cut a tile
    (docs/measurements.md: v6e-joined-pieces).  So where it can, it joins rows of one expert
    (:func:`gathered_by_expert`).

    Args:
      part: what this device keeps.
      spec: how the whole parameter lies on the mesh.
    """
    axes = tuple(axis for axis in mesh_axes_at(spec, 1) if axis != MODEL)
    (experts, rows, _), pieces = part.shape, math.prod(map(jax.lax.axis_size, axes))
    cut = rows % TPU_TILE_ROWS and not rows * experts % TPU_TILE_ROWS
    if current_target().platform == "tpu" and cut and pieces % experts == 0:
        return gathered_by_expert(part, axes)
    return gathered(part, spec)


def gathered_by_expert(part: Float[Array, "E f D"], axes: tuple[str, ...]) -> Array:
    """[E, F, D] from pieces along F: devices first swap what they keep.

    Then each has rows of one expert that follow each other, and all are put together as they lie.

    Args:
      part: what this device keeps.
      axes: of the mesh; a multiple of E devices lies along them.
    """
    experts, _, width = part.shape
    parts = math.prod(map(jax.lax.axis_size, axes)) // experts
    # Device p E + e gets part p of expert e, and hands it on to device e parts + p.
    swap = [[p * experts + e for e in range(experts)] for p in range(parts)]
    hand_on = [(p * experts + e, e * parts + p) for p in range(parts) for e in range(experts)]
    part = jax.lax.all_to_all(part, axes, 0, 0, axis_index_groups=swap, tiled=True)
    part = jax.lax.ppermute(part.reshape(-1, width), axes, hand_on)
    whole = jax.lax.all_gather(part, axes, axis=0, tiled=True)
    return checkpoint_name(whole.reshape(experts, -1, width), GATHERED)


def gathered_halves(part: Array, spec: P) -> Array:
    """Gate and up side by side, [..., D, 2F], put together: of both the columns of this device.

    The devices of the ``model`` axis keep pieces along D
    (:func:`~dynmoe_jax.mesh.axes.parameter_spec`), and exchange what each needs of the columns of
    the others.
    """
    parts, along = jax.lax.axis_size(MODEL), mesh_axes_at(spec, len(spec) - 2)
    if parts > 1:
        *front, rows, columns = part.shape
        part = part.reshape(*front, rows, 2, parts, columns // 2 // parts)
        if MODEL in along:
            part = jax.lax.all_to_all(
                part, MODEL, split_axis=part.ndim - 2, concat_axis=len(front), tiled=True
            )
        else:
            index = jax.lax.axis_index(MODEL)
            part = jax.lax.dynamic_index_in_dim(part, index, part.ndim - 2)
        part = part.reshape(*front, -1, columns // parts)
    rest = tuple(axis for axis in along if axis != MODEL)
    if rest:
        part = jax.lax.all_gather(part, rest, axis=part.ndim - 2, tiled=True)
    return checkpoint_name(part, GATHERED)


def keep_all_but_gathered(primitive, *_, **settings) -> bool:
    """A policy of ``jax.checkpoint``: backward keeps everything but parameters put together.

    What puts them together is left out as well, with a gradient rule of its own or without: to keep
    the one but not its name would be to keep it.  (So tokens that travelled are kept by a name of
    their own.)
    """
    if primitive.name == "name":
        return settings["name"] != GATHERED
    if primitive.name == "custom_vjp_call":
        inner = settings["call_jaxpr"].eqns
        named = (equation.params["name"] for equation in inner if equation.primitive.name == "name")
        constrained = any(equation.primitive.name == "sharding_constraint" for equation in inner)
        return GATHERED not in named and not constrained
    nothing_new = ("all_gather", "all_to_all", "optimization_barrier", "sharding_constraint")
    return primitive.name not in nothing_new


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_over(part: Array, axis: str) -> Array:
    """Sum over a mesh axis; its cotangent is the same on all devices, so backward is silent.

    (The transpose of ``psum`` is another one: it adds up equal shares of the cotangent.)
    """
    return jax.lax.psum(part, axis)


def _sum_forward(part, axis):
    return jax.lax.psum(part, axis), None


def _sum_backward(axis, _, share):
    return (share * jax.lax.axis_size(axis),)


sum_over.defvjp(_sum_forward, _sum_backward)
