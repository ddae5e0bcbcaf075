"""Keeps JAX from looking for accelerators that are not there.

The extras ``tpu-aot`` and ``gpu-aot`` bring compilers to machines without such a device.  JAX takes
them for drivers: every program would begin with what they print about the chips and libraries that
they do not find.
"""

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

_TPU_DEVICES = ("dev/accel*", "dev/vfio/[0-9]*")
_TPU_VENDOR = "0x1ae0"
_TPU_SETTINGS = frozenset(
    f"TPU_{name}" for name in ("ACCELERATOR_TYPE", "NAME", "WORKER_HOSTNAMES", "WORKER_ID")
)
"""Variables that a machine with a TPU has in its environment.  Others (TPU_LIBRARY_PATH,
TPU_SKIP_MDS_QUERY) JAX and libtpu set by themselves as they are imported."""
_GPU_DEVICES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")
"""JAX uses no NVIDIA GPU where none of these is."""


def leave_out_absent_accelerators(root: Path = Path("/")) -> None:
    """Call it before JAX is asked for devices; what is there or asked for stays as it is.

    Args:
      root: folder that holds ``dev`` and ``sys``.
    """
    if not any((root / device).exists() for device in _GPU_DEVICES):
        # JAX leaves them out by itself, but looks for CUDA's libraries first.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if importlib.util.find_spec("libtpu") is None or may_have_tpu(os.environ, root):
        return
    import jax
    from jax.extend.backend import register_backend_factory

    # Not empty where somebody asks for a TPU, or JAX itself has found one.
    if not jax.config.jax_platforms:
        register_backend_factory("tpu", lambda: None, priority=300, fail_quietly=True)


def may_have_tpu(environment: Mapping[str, str], root: Path) -> bool:
    """Whether a machine may have a TPU, by its devices and its environment.

    Args:
      environment: of this process.
      root: folder that holds ``dev`` and ``sys``.
    """
    if not _TPU_SETTINGS.isdisjoint(environment):
        return True
    if any(path for pattern in _TPU_DEVICES for path in root.glob(pattern)):
        return True
    for path in root.glob("sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii").strip() == _TPU_VENDOR:
                return True
    return False
