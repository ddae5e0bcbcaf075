"""NVIDIA GPUs that need not be there, described to XLA's compiler for them."""

import dataclasses
import importlib.metadata
import os

import jax

from dynmoe_jax import config
from dynmoe_jax.hardware.target import Target
from dynmoe_jax.planning.tpu.topology import Topology

PLUGIN = "jax-cuda13-plugin"
_NO_GPU_HERE = {
    # No driver is looked for, nor libraries of CUDA that compiling does without.
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
_KIB, _MIB = 2**10, 2**20


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Description of a GPU as the compiler asks for it, from its data sheet and the CUDA
    programming guide.

    Attributes:
      kind: as ``jax.Device.device_kind`` has it.
      compute_capability: e.g. ``"9.0"``.
      cores: streaming multiprocessors.
      cache_bytes: of the second level.
      memory_bytes: of the device.
      bytes_per_s: of its memory.
    """

    kind: str
    compute_capability: str
    cores: int
    cache_bytes: int
    memory_bytes: float
    bytes_per_s: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", "8.0", 108, 40 * _MIB, 80e9, 2.04e12),
    "a800": Gpu("NVIDIA A800-SXM4-80GB", "8.0", 108, 40 * _MIB, 80e9, 2.04e12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", "9.0", 132, 50 * _MIB, 80e9, 3.35e12),
    "h200": Gpu("NVIDIA H200", "9.0", 132, 50 * _MIB, 141e9, 4.8e12),
    "b200": Gpu("NVIDIA B200", "10.0", 148, 126 * _MIB, 180e9, 8.0e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", "8.9", 128, 72 * _MIB, 24e9, 1.01e12),
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


def describe_gpus(topology: Topology) -> list[jax.Device]:
    """The devices of boxes of GPUs that need not be there.

    Raises:
      ConfigError: the compiler for GPUs is not installed.
    """
    if reason := why_not():
        raise config.ConfigError(f"--compile: {reason}, which brings the compiler for GPUs.")
    boxes, each = topology.sizes if len(topology.sizes) == 2 else (1, topology.devices)
    return describe(GPUS[topology.chip_name], f"1x{boxes}x{each}")


def describe(gpu: Gpu, shape: str) -> list[jax.Device]:
    """Devices of a kind, e.g. ``"1x4x8"`` for four boxes of eight."""
    for name, value in _NO_GPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    target = _target_config(gpu)
    described = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape)
    return list(described.devices)


def _target_config(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability.split(".")
    shared = Target("gpu", gpu.kind, float(gpu.compute_capability)).shared_bytes
    threads = 1536 if (major, minor) == ("8", "9") else 2048
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024
          threads_per_warp: 32
          shared_memory_per_block: {48 * _KIB}
          shared_memory_per_block_optin: {shared}
          shared_memory_per_core: {shared + _KIB}
          threads_per_core_limit: {threads}
          core_count: {gpu.cores}
          fpus_per_core: {64 if gpu.compute_capability == "8.0" else 128}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          memory_bandwidth: {gpu.bytes_per_s:.0f}
          l2_cache_size: {gpu.cache_bytes}
          clock_rate_ghz: 1.7
          device_memory_size: {gpu.memory_bytes:.0f}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 13 }}
        device_description_str: "{gpu.kind}"
    """
