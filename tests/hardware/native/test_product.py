"""The product of matrices that all kernels share, compiled for CPUs of several kinds."""

import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest

from dynmoe_jax.hardware.native import library

SOURCE = Path(__file__).parent / "product_test.cc"
X86 = platform.machine() == "x86_64"
CPUS = {"this one": ()}
if X86:
    # Newer ones run what was compiled for older ones.
    CPUS |= {"this one without AMX": ("-mno-amx-bf16",), "any of 64 bits": ("-march=x86-64",)}

pytestmark = pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())


@pytest.mark.slow
@pytest.mark.parametrize("cpu", CPUS)
def test_products_of_all_kinds_of_sides_and_sizes(tmp_path, cpu):
    program = tmp_path / "product_test"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = f"-I{library.FOLDER}"
    # The last of several processors counts.
    flags = [*library.FLAGS, library._for_this_machine(), *CPUS[cpu]]
    subprocess.run([*compiler, *flags, include, SOURCE, "-o", program], check=True)
    run = subprocess.run([program], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
