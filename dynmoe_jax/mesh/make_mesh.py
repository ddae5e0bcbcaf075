"""Devices in a mesh, and what lies where on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dynmoe_jax import config
from dynmoe_jax.config.layers import LayerSettings
from dynmoe_jax.mesh.axes import (
    BATCH,
    MESH_AXES,
    axes_of,
    batch_devices,
    mesh_axes_at,
    parameter_spec,
)


def mesh_shape(mesh: config.Mesh, devices: int) -> dict[str, int]:
    """Devices along each axis; an axis of -1 takes what the others leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    sizes = {axis: size if size > 0 else devices // known for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise config.ConfigError(
            f"config.mesh asks for {asked} devices but there are {devices}; set "
            "config.mesh.data=-1 to use them all."
        )
    return sizes


def make_mesh(
    mesh: config.Mesh, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The device mesh of the settings.

    Args:
      mesh: devices along each axis; -1 takes what is left.
      batch_size: sequences per microbatch, which the batch axes split.
      devices: by default all; others may be described by ``jax.experimental.topologies``.

    Raises:
      ConfigError: the sizes do not fit the devices, or the batch does not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_shape(mesh, len(devices))
    parts = batch_devices(sizes)
    if batch_size % parts:
        raise config.ConfigError(
            f"config.train.batch_size / config.train.microbatches = {batch_size} must be a "
            f"multiple of the {parts} devices of config.mesh.slice x data x expert."
        )
    return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arranged(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
    """The devices as an array, such that each axis runs along the fastest links that it can.

    Slices are those that the devices belong to (TPU) or else processes; where neither tells as
    many slices as are asked for (devices of one host, simulated ones), they are cut as they come.
    """
    shape, slices = tuple(sizes.values()), sizes["slice"]
    if slices > 1:
        inner, outer = (1, *shape[1:]), (slices, *(1 for _ in shape[1:]))
        for of_device in ("slice_index", "process_index"):
            if len({getattr(device, of_device, 0) for device in devices}) == slices:
                return mesh_utils.create_hybrid_device_mesh(
                    inner, outer, devices, process_is_granule=of_device == "process_index"
                )
        return np.asarray(devices).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def check_divides(model: config.Model, sizes: Mapping[str, int]) -> None:
    """Refuses a mesh that would have to cut an expert or a head.

    Raises:
      ConfigError: a mesh axis does not divide what it splits.
    """
    for layer, i in {layer: i for i, layer in enumerate(model.by_layer)}.items():
        _check_layer(layer, sizes, f" of layer {i}" if model.layers else "")


def _check_layer(layer: LayerSettings, sizes: Mapping[str, int], where: str) -> None:
    model, moe = layer.model, layer.model.moe
    groups = moe.num_experts // moe.adjugate_group
    if layer.is_moe and moe.num_experts % sizes["expert"]:
        raise config.ConfigError(
            f"config.mesh.expert={sizes['expert']} must divide "
            f"config.model.moe.num_experts={moe.num_experts}{where}."
        )
    if layer.is_moe and moe.adjugate_width and groups % sizes["expert"]:
        raise config.ConfigError(
            f"config.mesh.expert={sizes['expert']} must divide the {groups} groups of "
            f"config.model.moe.adjugate_group={moe.adjugate_group} experts{where}."
        )
    split = {"num_heads": model.num_heads, "num_kv_heads": model.num_kv_heads}
    if layer.is_moe:
        if moe.expert_kind.splits_hidden:
            split["moe.hidden_width"] = moe.hidden_width
            split["moe.adjugate_width"] = moe.adjugate_width
        split["moe.shared_hidden_width"] = moe.shared_hidden_width
    elif model.feed_forward_kind.splits_hidden:
        split["hidden_width"] = model.hidden_width
    for name, size in split.items():
        if size % sizes["model"]:
            raise config.ConfigError(
                f"config.mesh.model={sizes['model']} must divide config.model.{name}={size}{where}."
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[B, ...] split over the batch axes."""
    return NamedSharding(mesh, P(BATCH))


def state_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Sharding of each array of a state: parameters by their names, moments like their parameter.

    Args:
      shapes: a tree of arrays or of shapes, such as a TrainState.
      mesh: the devices.
    """
    sizes = dict(mesh.shape)

    def of_leaf(path, leaf):
        return NamedSharding(mesh, parameter_spec(_name(path), leaf.shape, sizes))

    return jax.tree.map_with_path(of_leaf, shapes)


def bytes_per_device(shapes: Any, sizes: Mapping[str, int]) -> int:
    """Bytes that one device holds of a state, sharded as :func:`state_shardings` says."""

    def of_leaf(path, leaf):
        spec = parameter_spec(_name(path), leaf.shape, dict(sizes))
        axes = [axis for dimension in range(len(spec)) for axis in mesh_axes_at(spec, dimension)]
        parts = math.prod(sizes.get(axis, 1) for axis in axes)
        return math.prod(leaf.shape) * leaf.dtype.itemsize // parts

    return sum(jax.tree.leaves(jax.tree.map_with_path(of_leaf, shapes)))


def _name(path: tuple) -> str:
    """The name of the parameter that a leaf belongs to; empty where there is none."""
    names = (str(getattr(key, "key", getattr(key, "name", ""))) for key in reversed(path))
    return next((name for name in names if axes_of(name)), "")
