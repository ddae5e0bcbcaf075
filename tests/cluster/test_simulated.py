"""Simulated devices get threads to wait in, in a process of their own: XLA counts them once."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import pathlib
from dynmoe_jax.cluster.joining import joined
from dynmoe_jax.cluster.rank import Rank
import jax
with joined(Rank(), []):
    jax.devices()
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
print(names.count("tf_XLAEigen"))
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux lists the threads of a process"
)


def threads(**environment: str) -> int:
    wanted = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=wanted | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_each_simulated_device_may_wait_in_several_collectives():
    assert threads(XLA_FLAGS="--xla_force_host_platform_device_count=3") == 24
    assert threads(JAX_NUM_CPU_DEVICES="2") == 16


def test_what_is_asked_for_stays():
    flags = "--xla_force_host_platform_device_count=3"
    assert threads(XLA_FLAGS=flags, PJRT_NPROC="5") == 5


def test_one_device_gets_a_thread_for_each_core():
    assert threads() == len(os.sched_getaffinity(0))
