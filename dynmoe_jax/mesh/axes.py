"""Mesh axes, and which of the letters in a name lies along which: the one table of sharding.

Names of arrays end in their axes (``gate_up_ED2F``), so a name says how its array is sharded, and
a new parameter is sharded by being named.

Four mesh axes, from the slowest links to the fastest:

- ``slice``: copies of everything, joined by a data-centre network.  It splits the batch alone.
- ``data``: data parallelism with sharded parameters (FSDP, ZeRO-3).  It splits the batch; each of
  its devices keeps a piece of the parameters, and an all-gather makes them whole layer by layer.
- ``expert``: expert parallelism.  It splits the batch too; every device keeps E / expert of the
  experts, and tokens travel.  Parameters without experts are shared along it like along ``data``.
- ``model``: tensor parallelism.  It splits heads, hidden width and vocabulary.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import PartitionSpec as P

SLICE, DATA, EXPERT, MODEL = MESH_AXES = ("slice", "data", "expert", "model")

BATCH = (SLICE, DATA, EXPERT)
"""The axes that split the batch."""

ALONG = {"E": EXPERT, "H": MODEL, "G": MODEL, "F": MODEL, "V": MODEL}
"""The mesh axis of an axis of a parameter."""

SHARED = (DATA, EXPERT)
"""The mesh axes whose devices share a parameter beyond that (FSDP): each keeps a piece of it, and
they put it together when its layer is computed.  Along ``expert`` experts are not shared: they
differ."""

_AXES_OF_NAME = re.compile(r"_((?:\d?[A-Z]|1)+)$")


def axes_of(name: str) -> list[str]:
    """The axes that a name ends in: E, D and 2F of ``gate_up_ED2F``, none of ``scale``."""
    found = _AXES_OF_NAME.search(name)
    return re.findall(r"\d?[A-Z]|1", found[1]) if found else []


def parameter_spec(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """Sharding of a parameter on a mesh.

    Axes in front of those of the name (a stack of layers) stay whole, and so does an axis that the
    mesh axes do not divide.

    Args:
      name: of the parameter.
      shape: of the whole parameter.
      sizes: devices along each mesh axis.
    """
    axes = axes_of(name)
    front = len(shape) - len(axes)
    lengths = dict(zip(axes, shape[front:], strict=True))

    def fits(axis, mesh_axes):
        return lengths[axis] % math.prod(sizes.get(a, 1) for a in mesh_axes) == 0

    taken = {
        a: (ALONG[a],) for a in axes if sizes.get(ALONG.get(a), 1) > 1 and fits(a, (ALONG[a],))
    }
    used = {mesh_axis for mesh_axes in taken.values() for mesh_axis in mesh_axes}
    shared = SHARED if "2F" not in axes else (*SHARED, MODEL)
    shared = tuple(a for a in shared if sizes.get(a, 1) > 1 and a not in used)
    for axis in _pieces_of(axes) if shared else ():
        if fits(axis, (*taken.get(axis, ()), *shared)):
            taken[axis] = (*taken.get(axis, ()), *shared)
            break
    return P(*(None for _ in range(front)), *(taken.get(axis) for axis in axes))


def _pieces_of(axes: list[str]) -> list[str]:
    """The axes that a parameter may be cut in pieces along, the best one first.

    D, unless it is the last: pieces of the last axis would be narrower than the tiles of a TPU,
    which then puts them together by adding up zeros (compiled for v5p).  Never experts, and never
    2F, gate and up side by side, of which a device needs the same columns twice: what ``model``
    would take of F it takes of D, until the parameter is put together.
    """
    if "D" not in axes:
        return []
    if axes[-1] != "D":
        return ["D"]
    return [axis for axis in axes if axis != "E"]


def mesh_axes_at(spec: P, dimension: int) -> tuple[str, ...]:
    """The mesh axes along one dimension, however the spec writes them."""
    axes = spec[dimension]
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def mesh_sizes() -> dict[str, int]:
    """Devices along each axis of the mesh of the context; all 1 outside of any."""
    return dict.fromkeys(MESH_AXES, 1) | dict(jax.sharding.get_abstract_mesh().shape)


def batch_devices(sizes: Mapping[str, int]) -> int:
    """Devices that the batch is split over."""
    return math.prod(sizes.get(axis, 1) for axis in BATCH)


def on_one_device() -> bool:
    """Whether there is no mesh in the context, or one of a single device."""
    return math.prod(mesh_sizes().values()) == 1
