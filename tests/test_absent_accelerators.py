"""Compilers for accelerators that are not there say nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_jax.absent_accelerators import leave_out_absent_accelerators, may_have_tpu

LIBTPU = """
import sys
def get_library_path():
    if sys._getframe(2).f_code.co_name != "cloud_tpu_init":  # that of `import jax`
        print("looking for a TPU", flush=True)
    return "/no/such/library.so"
"""
COMMAND = """
from dynmoe_jax.command_line import exit_code
def program():
    import jax
    print(jax.devices()[0].platform)
    return 0
raise SystemExit(exit_code(program))
"""


@pytest.fixture
def printed(tmp_path):
    """Runs a command where a compiler for TPUs is installed; what it prints."""
    (tmp_path / "libtpu.py").write_text(LIBTPU, encoding="utf-8")

    def printed(**variables):
        path = os.pathsep.join([str(tmp_path), *sys.path])
        ours = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
        done = subprocess.run(
            [sys.executable, "-c", COMMAND],
            env=ours | {"PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + done.stderr

    return printed


@pytest.mark.skipif(may_have_tpu(os.environ, Path("/")), reason="a TPU")
def test_nothing_is_said_about_a_tpu_that_is_not_there(printed):
    assert printed() in ("cpu\n", "gpu\n")


def test_tpu_that_is_asked_for_is_looked_for(printed):
    assert "looking for a TPU" in printed(JAX_PLATFORMS="tpu")


@pytest.mark.parametrize(
    ("path", "content", "found"),
    [
        ("dev/accel0", "", True),
        ("dev/vfio/0", "", True),
        ("dev/vfio/vfio", "", False),
        ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x1ae0\n", True),
        ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x10de\n", False),
    ],
)
def test_tpu_is_known_by_its_devices(tmp_path, path, content, found):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="ascii")
    assert may_have_tpu({}, tmp_path) is found


def test_tpu_is_known_by_the_environment_of_its_machine(tmp_path):
    assert may_have_tpu({"TPU_WORKER_ID": "0"}, tmp_path)
    # JAX sets it where it sees no chip.
    assert not may_have_tpu({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path)


def test_libraries_of_cuda_are_looked_for_where_a_gpu_is(tmp_path, monkeypatch):
    name = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.delenv(name)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    leave_out_absent_accelerators(tmp_path)
    assert name not in os.environ
    (tmp_path / "dev" / "nvidiactl").unlink()
    leave_out_absent_accelerators(tmp_path)
    assert os.environ[name] == "1"
