"""Compilers for accelerators that are not there say nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_jax.hardware.absent_accelerators import leave_out_absent_accelerators, may_have_tpu

LIBTPU = """
import os
os.environ["TPU_LIBRARY_PATH"] = __file__  # as the real one does, of a file that can be loaded
def get_library_path():
    return __file__
"""
COMMAND = """
import logging, sys
import jax  # as most commands do
from dynmoe_jax.command_line import exit_code
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("log: %(message)s"))
logger = logging.getLogger("jax._src.xla_bridge")
logger.addHandler(handler)
logger.setLevel(logging.INFO)
def program():
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
        ours = {
            name: value
            for name, value in os.environ.items()
            if name != "JAX_PLATFORMS" and not name.startswith("TPU_")
        }
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


@pytest.mark.skipif(may_have_tpu({}, Path("/")), reason="a TPU")
def test_nothing_is_said_about_a_tpu_that_is_not_there(printed):
    said = printed()
    assert "libtpu.py" not in said  # nothing tried to load it
    shown = [line for line in said.splitlines() if not line.startswith("log: ")]
    assert shown in (["cpu"], ["gpu"])


def test_tpu_that_is_asked_for_is_looked_for(printed):
    assert "libtpu.py: invalid ELF header" in printed(JAX_PLATFORMS="tpu")


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
    # JAX and libtpu set these on any machine.
    assert not may_have_tpu({"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "x"}, tmp_path)


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
