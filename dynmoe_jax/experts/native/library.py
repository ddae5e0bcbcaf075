"""Compiles the kernels for this machine, once, and tells XLA of them.

The C++ compiler that is installed does it the first time, in about ten seconds; the library then
lies in the user's cache folder, under a name that says what it was made from.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "experts.cc"
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared")
HANDLERS = ("dynmoe_experts", "dynmoe_experts_gradient")

_log = logging.getLogger(__name__)


class NotAvailableError(Exception):
    """The kernels cannot be had here; the message says why, and what would help."""


@functools.cache
def load() -> None:
    """Compiles the kernels, unless that has been done before, and registers them.

    Raises:
      NotAvailableError: there is no compiler, or it could not compile them.
    """
    library = ctypes.cdll.LoadLibrary(str(_compiled()))
    for name in HANDLERS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


@functools.cache
def why_not() -> str:
    """Why the kernels cannot be had here; empty if they can."""
    try:
        load()
    except NotAvailableError as error:
        return str(error)
    return ""


def _compiled() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        raise NotAvailableError("there is no C++ compiler (c++), install GCC or Clang")
    command = [compiler, *FLAGS, _machine_flag(), "-isystem", jax.ffi.include_dir()]
    # The macros that the compiler predefines name its version and all instructions of this
    # machine: a home directory may be shared by unlike ones.
    macros = _output([compiler, _machine_flag(), "-dM", "-E", "-x", "c++", os.devnull])
    sources = (path.read_text() for path in sorted([SOURCE, *FOLDER.glob("*.h")]))
    made_from = "\n".join([macros, *command, jax.version.__version__, *sources])
    name = hashlib.sha256(made_from.encode()).hexdigest()[:16]
    path = _cache_folder() / f"experts-{name}.so"
    if not path.exists():
        _log.info("Compiling the CPU kernels of the experts, once.")
        # Under another name first: several processes may be about to do the same.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            _output([*command, str(SOURCE), "-o", str(new)])
            new.replace(path)
    return path


def _machine_flag() -> str:
    return "-mcpu=native" if sys.platform == "darwin" else "-march=native"


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "dynmoe_jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotAvailableError(
            f"{folder} cannot be made ({error.strerror}), set XDG_CACHE_HOME to a folder"
        ) from error
    return folder


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise NotAvailableError(f"{command[0]} does not run ({error.strerror})") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or ["nothing"]
        raise NotAvailableError(f"{command[0]} could not compile them: {said[0]}") from error
