"""Compilation of programs: kept for the next start (JAX's persistent compilation cache, on by
default), and with the options that a platform needs.
"""

import contextlib
import functools
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from dynmoe_jax import config
from dynmoe_jax.console import warn
from dynmoe_jax.hardware.target import Target

FOLDER = "compiled"
OFF = "none"
_CPU_INFO = Path("/proc/cpuinfo")
_WORTH_KEEPING_S = 0.1

TPU_OPTIONS = {
    f"xla_{name}": "true"
    for name in (
        "tpu_enable_async_collective_fusion",
        "tpu_enable_async_collective_fusion_multiple_steps",
        "tpu_overlap_compute_collective_tc",
        "enable_async_all_gather",
        "tpu_enable_sparse_core_collective_offload_all_gather",
        "tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "tpu_enable_sparse_core_collective_offload_2d_all_gather",
        "tpu_enable_sparse_core_collective_offload_3d_all_gather",
        "tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
        "tpu_prefer_async_allgather_to_allreduce",
        "tpu_enable_sparse_core_offload_queuing_in_lhs",
    )
} | {
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_sparse_core_offload_queuing_overlap_limit": "4",
}
"""Parameters travel while others compute, and as pieces.  Without these, libtpu 0.0.42 makes the
all-gather of a mesh axis that winds through a 3D torus an all-reduce over zeros, and so the
reduce-scatter of gradients: twice the bytes, and the whole sum on every device (compiled for
v5p:4x4x4, ``data=64``).  Fused with products, of which XLA has few here, an all-gather would wait
longer on v6e.  Up to four transfers queue while others travel, which leaves less waiting than one
at a time (docs/measurements.md: v6e-fused-all-gather, v6e-transfer-queue)."""

CPU_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}
"""Without it, a step first copies AdamW's moments, each of which is updated in place
(docs/measurements.md: cpu-moment-copies)."""


def options_of(target: Target) -> dict[str, str | bool]:
    """XLA's options for a training step on ``target``."""
    return {"tpu": TPU_OPTIONS, "cpu": CPU_OPTIONS}.get(target.platform, {})


@functools.cache
def compiler_options(target: Target) -> dict[str, str | bool]:
    """Compiler options of :func:`options_of`; a version of XLA that does not know them gets none.

    They decide about speed alone.
    """
    options = options_of(target)
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        warn(f"XLA compiles without options that would make steps faster: {reason}")
        return {}
    return options


@contextlib.contextmanager
def compiled_programs_kept(train: config.Train, workdir: Path) -> Iterator[None]:
    """Inside, JAX looks for compiled programs in a folder of the run, and leaves them there.

    In the run's folder, not the user's: it outlives a machine that is taken away.  A cache that
    the environment has set up (``JAX_COMPILATION_CACHE_DIR``) is left as it is.

    Args:
      train: the settings.
      workdir: the run's folder.
    """
    if jax.config.jax_compilation_cache_dir or train.compilation_cache == OFF:
        yield
        return
    folder = Path(train.compilation_cache or workdir / FOLDER).expanduser() / _machine()
    values = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": _WORTH_KEEPING_S,
    }
    before = {name: getattr(jax.config, name) for name in values}
    _configure(values)
    try:
        yield
    finally:
        _configure(before)


def _configure(values: dict) -> None:
    # JAX looks at its settings once in a process, unless it is told to forget.
    compilation_cache.reset_cache()
    for name, value in values.items():
        jax.config.update(name, value)


def _machine() -> str:
    """A folder's name for what compiled programs depend on beyond what JAX compares by itself.

    XLA compiles for the very CPU that it runs on, and a program that another one loads may end
    with an illegal instruction.
    """
    kind = jax.default_backend()
    if kind != "cpu":
        return kind
    features = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        features += "".join(sorted({line for line in lines if line.startswith(wanted)}))
    return f"{kind}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
