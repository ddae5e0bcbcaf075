"""Mesh axes, and which of the letters in a name lies along which: the one table of sharding.

Names of arrays end in their axes (``gate_up_ED2F``), so a name says how its array is sharded, and
a new parameter is sharded by being named.

Four mesh axes, from the slowest links to the fastest:

- ``slice``: copies of everything, joined by a data-centre network.  It splits the batch alone.
- ``data``: splits the batch; parameters are cut along D over it, and gathered layer by layer
  (FSDP, ZeRO-3).
- ``expert``: splits the batch too; every device keeps E / expert of the experts, and tokens travel.
  Parameters without experts are cut over it like over ``data``.
- ``model``: splits heads, hidden width and vocabulary.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import PartitionSpec as P

SLICE, DATA, EXPERT, MODEL = MESH_AXES = ("slice", "data", "expert", "model")

BATCH = (SLICE, DATA, EXPERT)
"""The axes that split the batch."""

ALONG: dict[str, tuple[str, ...]] = {
    "E": (EXPERT,),
    "H": (MODEL,),
    "G": (MODEL,),
    "F": (MODEL,),
    "V": (MODEL,),
    "D": (DATA, EXPERT),
}
"""Mesh axes of each axis of a parameter, less those that one further up has taken.

``2F``, gate and up side by side, is not cut: a device needs the same columns of both.  So what the
``model`` axis would take of F it takes of D, until the parameter is put together for its layer.
"""

_AXES_OF_NAME = re.compile(r"_((?:\d?[A-Z]|1)+)$")


def axes_of(name: str) -> list[str]:
    """The axes that a name ends in: E, D and 2F of ``gate_up_ED2F``, none of ``scale``."""
    found = _AXES_OF_NAME.search(name)
    return re.findall(r"\d?[A-Z]|1", found[1]) if found else []


def parameter_spec(name: str, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """How a parameter lies on a mesh.

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
    along = ALONG | ({"D": (DATA, EXPERT, MODEL)} if "2F" in axes else {})
    taken: dict[str, tuple[str, ...]] = {}
    for axis in along:
        free = set(MESH_AXES) - {mesh_axis for others in taken.values() for mesh_axis in others}
        mine = tuple(a for a in along[axis] if sizes.get(a, 1) > 1 and a in free)
        if axis in lengths and mine and lengths[axis] % math.prod(sizes[a] for a in mine) == 0:
            taken[axis] = mine
    return P(*(None for _ in range(front)), *(taken.get(axis) for axis in axes))


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
