"""Devices in a mesh, and what lies where on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config

AXES = ("data", "expert", "model")


def make_mesh(mesh: config.Mesh, batch_size: int) -> Mesh:
    """The device mesh of the settings.

    Args:
      mesh: devices along each axis; -1 takes what is left.
      batch_size: sequences per microbatch, which the data axis splits.

    Raises:
      ConfigError: the sizes do not fit the devices, or the batch does not divide.
    """
    devices = jax.device_count()
    sizes = [getattr(mesh, axis) for axis in AXES]
    known = 1
    for size in sizes:
        known *= size if size > 0 else 1
    sizes = [size if size > 0 else devices // known for size in sizes]
    total = sizes[0] * sizes[1] * sizes[2]
    if total != devices:
        raise config.ConfigError(
            f"config.mesh asks for {' x '.join(map(str, sizes))} devices but there are {devices}; "
            "set config.mesh.data=-1 to use them all."
        )
    if batch_size % sizes[0]:
        raise config.ConfigError(
            f"config.train.batch_size / config.train.microbatches = {batch_size} must be a "
            f"multiple of the {sizes[0]} devices of config.mesh.data."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] split over the data axis."""
    return NamedSharding(mesh, P("data"))
