"""Compiling for NVIDIA GPUs that are not there (extra ``gpu-aot``)."""

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dynmoe_jax.mesh.axes import MESH_AXES
from dynmoe_jax.planning.gpu.devices import GPUS, describe, why_not
from tests.sources_kept import sources_kept

__all__ = ["mesh_of", "sources_kept"]


@pytest.fixture(scope="session")
def mesh_of():
    """(chip, devices) -> a mesh over devices of that chip."""
    if reason := why_not():
        pytest.skip(reason)

    def make(chip: str, count: int = 1) -> Mesh:
        devices = np.array(describe(GPUS[chip], f"1x1x{count}")).reshape(1, count, 1, 1)
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    return make
