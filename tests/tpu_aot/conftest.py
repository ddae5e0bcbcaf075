"""Compiling for TPUs that are not there (extra ``tpu-aot``)."""

import importlib.metadata
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from packaging.requirements import Requirement

from dynmoe_jax.axes import MESH_AXES

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Before libtpu is loaded: there is no cloud to ask, and no chip that two processes could share.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def why_not() -> str:
    """Why nothing can be compiled for a TPU here; empty if it can."""
    wanted = [Requirement(text) for text in importlib.metadata.requires("jax") or ()]
    wanted = [r for r in wanted if r.name == "libtpu"]
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu is not installed: pip install -e '.[tpu-aot]'"
    if not all(r.specifier.contains(version) for r in wanted):
        # A newer one writes HLO that this jaxlib cannot read.
        return f"libtpu {version} is not the one that JAX {jax.__version__} asks for ({wanted[0]})"
    return ""


@pytest.fixture(scope="session")
def mesh_of():
    """(chip, devices) -> a mesh over devices of that chip."""
    if reason := why_not():
        pytest.skip(reason)

    def make(chip: str, count: int = 1) -> Mesh:
        topology = topologies.get_topology_desc(topology_name=TOPOLOGIES[chip], platform="tpu")
        devices = np.array(topology.devices[:count]).reshape(1, count, 1, 1)
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    return make
