"""Compiles the kernels for this machine, once, and tells XLA of them.

The C++ compiler that is installed (``CXX``, otherwise ``c++``) does it the first time, in seconds
(docs/measurements.md: cpu-kernels-compile); the library then lies in the user's cache folder, under
a name that follows from all that it is made from.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from dynmoe_jax.console import stage, warn

FOLDER = Path(__file__).parent
HANDLERS = (
    "dynmoe_attention",
    "dynmoe_attention_gradient",
    "dynmoe_experts",
    "dynmoe_experts_gradient",
    "dynmoe_product",
)
FLAGS = ("-std=c++20", "-O3", "-fPIC")


class NotAvailableError(Exception):
    """Raised where the kernels cannot be had; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """Compiles the kernels, unless that has been done before, and registers them.

    Returns:
      the library.

    Raises:
      NotAvailableError: there is no compiler, it could not compile them, or what it compiled cannot
        be loaded.
    """
    path = _compiled()
    try:
        library = ctypes.cdll.LoadLibrary(str(path))
    except OSError as error:
        raise NotAvailableError(f"{path} cannot be loaded ({error}); delete it") from error
    for name in HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return library


@functools.cache
def why_not() -> str:
    """Why the kernels cannot be had here, in part of a sentence; empty if they can."""
    try:
        load()
    except NotAvailableError as error:
        return str(error)
    return ""


@functools.cache
def available() -> bool:
    """Whether the kernels can be had here; if not, a warning says why, once."""
    if reason := why_not():
        warn(
            f"XLA computes experts and attention, slower than kernels for this CPU would: {reason}."
        )
    return not reason


@functools.cache
def has_matrix_unit() -> bool:
    """Whether this CPU has a matrix unit, and the kernels multiply on it."""
    if not available():
        return False
    asked = load().dynmoe_has_matrix_unit
    asked.restype = ctypes.c_bool
    return asked()


def _compiled() -> Path:
    """Returns the library, which is compiled unless one of the same sources is there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++")]
    if not compiler[0]:
        raise NotAvailableError("there is no C++ compiler; install GCC or Clang")
    command = [*compiler, *FLAGS, _for_this_machine(), "-isystem", jax.ffi.include_dir()]
    # The macros that the compiler defines by itself name its version and all instructions of this
    # machine: a home directory may be shared by unlike ones.
    macros = _output([*command, "-dM", "-E", "-x", "c++", os.devnull])
    sources = [path.read_text(encoding="ascii") for path in sorted(FOLDER.glob("*.[ch]*"))]
    made_from = "\n".join([macros, *command, jax.lib.__version__, *sources])
    name = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    path = _cache_folder() / f"kernels-{name}.so"
    if not path.exists():
        with stage("Compiling kernels for this CPU, once"):
            _compile(command, path)
    return path


def _compile(command: list[str], path: Path) -> None:
    # Under another name first: several processes may be about to do the same.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        sources = sorted(FOLDER.glob("*.cc"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [
            [*command, "-c", str(source), "-o", to]
            for source, to in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(_output, commands))
        new = Path(folder) / path.name
        _output([*command, "-shared", *objects, "-o", str(new)])
        new.replace(path)


def _for_this_machine() -> str:
    return "-mcpu=native" if sys.platform == "darwin" else "-march=native"


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "dynmoe_jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NotAvailableError(
            f"{folder} cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder"
        ) from error
    return folder


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise NotAvailableError(f"{command[0]} does not run ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line]
        reason = said[0] if said else f"it ended with {error.returncode}"
        raise NotAvailableError(f"{command[0]} does not compile them ({reason})") from error
