"""Compiling for TPUs that are not there (extra ``tpu-aot``)."""

import os

import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.planning.tpu.topology import why_not
from tests.sources_kept import sources_kept

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Before libtpu is loaded: there is no cloud to ask, and no chip that two processes could share.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


__all__ = ["mesh_of", "sources_kept"]


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
