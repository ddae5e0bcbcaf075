"""Compiled programs kept for the next start: JAX's persistent compilation cache, on by default."""

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from dynmoe_jax import config

FOLDER = "compiled"
OFF = "none"
_CPU_INFO = Path("/proc/cpuinfo")
_WORTH_KEEPING_S = 0.1


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
