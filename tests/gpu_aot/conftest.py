"""Compiling for NVIDIA GPUs that are not there (extra ``gpu-aot``)."""

import importlib.metadata
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from dynmoe_jax.axes import MESH_AXES

# Before the plugin is loaded, which would look for a driver.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

PLUGIN = "jax-cuda13-plugin"

# Of data sheets and the CUDA programming guide: compute capability, SMs, bytes of shared memory
# that a program may have and that an SM has, of L2 cache and of memory, bytes per second.
CHIPS = {
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 232448, 233472, 50 << 20, 80e9, 3.35e12),
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 108, 166912, 167936, 40 << 20, 80e9, 2.0e12),
    "rtx4090": ("NVIDIA GeForce RTX 4090", "8.9", 128, 101376, 102400, 72 << 20, 24e9, 1.0e12),
}


def why_not() -> str:
    """Why nothing can be compiled for a GPU here; empty if it can."""
    try:
        version = importlib.metadata.version(PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        return f"{PLUGIN} is not installed: pip install -e '.[gpu-aot]'"
    if version != jax.__version__:
        return f"{PLUGIN} {version} is not that of JAX {jax.__version__}"
    return ""


def described(chip: str) -> str:
    """What XLA has to know of a chip."""
    name, capability, cores, shared, shared_of_core, cache, memory, bytes_per_s = CHIPS[chip]
    major, minor = capability.split(".")
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {shared}
          shared_memory_per_core: {shared_of_core}
          threads_per_core_limit: {1536 if capability == "8.9" else 2048}
          core_count: {cores}
          fpus_per_core: {64 if capability == "8.0" else 128}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {bytes_per_s:.0f}
          l2_cache_size: {cache}
          clock_rate_ghz: 1.7
          device_memory_size: {memory:.0f}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{name}"
    """


@pytest.fixture(scope="session")
def mesh_of():
    """(chip, devices) -> a mesh over devices of that chip."""
    if reason := why_not():
        pytest.skip(reason)

    def make(chip: str, count: int = 1) -> Mesh:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=described(chip), topology=f"1x1x{count}"
        )
        devices = np.array(topology.devices).reshape(1, count, 1, 1)
        return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 4)

    return make
