"""Processes with the variables that SLURM's srun and Open MPI's mpirun set, without either."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_jax import command_line
from dynmoe_jax.cluster.rank import EXIT_PEER_LOST, Rank, rank_from
from dynmoe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
FIRST_PORT, PORTS = 61440, 4096
"""JAX has a job of SLURM or Open MPI 4 meet at a port that it makes from the job's number."""

# Prints, in process 0, of each process: its number, the devices of all, and the GPU it would take.
PROGRAM = """
import sys
import jax
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from dynmoe_jax import command_line
from dynmoe_jax.cluster import agreement
from dynmoe_jax.cluster.joining import joined

rank, _ = command_line.parse_rank(sys.argv)
with joined(rank, []):
    seen = jax.process_index(), jax.device_count(), CUDA_VISIBLE_DEVICES.value
    print(agreement.gather(seen))
"""


def slurm(number, port):
    return {
        "SLURM_JOB_ID": str(7 * PORTS + port - FIRST_PORT),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def open_mpi_5(number, _=None):
    return {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }


def open_mpi_4(number, port):
    job = (port - FIRST_PORT) << 12
    address = {"OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1;tcp6://[::1]:1"}
    return open_mpi_5(number) | address


def open_mpi_5_in_slurm(number, port):
    """A process whose machine SLURM has given one task, to start all processes there."""
    return slurm(0, port) | open_mpi_5(number)


def free_port():
    for port in random.sample(range(FIRST_PORT, FIRST_PORT + PORTS), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise OSError(f"no port is free from {FIRST_PORT} on")


def start(variables, *arguments):
    launchers = ("SLURM_", "OMPI_", "PMIX_", "JAX_COORDINATOR")
    clean = {name: text for name, text in os.environ.items() if not name.startswith(launchers)}
    flags = re.sub(r"--xla_force\S+", "", os.environ["XLA_FLAGS"])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env=clean | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes):
    """[(exit code, stdout, stderr)]."""
    try:
        printed = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, printed, strict=True)]


@pytest.mark.parametrize(
    "launcher",
    [
        slurm,
        pytest.param(open_mpi_4, marks=pytest.mark.long),
        open_mpi_5,
        pytest.param(open_mpi_5_in_slurm, marks=pytest.mark.long),
    ],
)
def test_processes_of_a_launcher_join_one_cluster(launcher):
    port = free_port()
    flags = [f"--coordinator=localhost:{port}"] if "open_mpi_5" in launcher.__name__ else []
    ended = ends([start(launcher(number, port), *flags) for number in range(2)])
    assert [code for code, *_ in ended] == [0, 0], ended
    assert ended[0][1].splitlines()[-1] == "[(0, 2, '0'), [1, 2, '1']]"
    assert ended[1][1].splitlines()[-1] == "None"


@pytest.mark.parametrize(
    "launcher", [slurm, pytest.param(open_mpi_4, marks=pytest.mark.long), open_mpi_5]
)
def test_process_by_itself_inside_a_launcher(launcher):
    """It would wait for one that never comes, or be refused."""
    ((code, printed, errors),) = ends([start(launcher(1, FIRST_PORT), "--num_processes=1")])
    assert code == 0, errors
    assert printed == "[(0, 1, 'all')]\n"


def test_task_that_slurm_starts_alone_says_what_to_give():
    port = free_port()
    ((code, _, errors),) = ends([start(slurm(0, port), "--connect_timeout=1")])
    assert code == EXIT_PEER_LOST, errors
    assert f"were not reached at localhost:{port} within --connect_timeout=1 seconds" in errors
    assert "or --num_processes=1 for a process by itself." in errors


def test_open_mpi_5_without_the_address_is_refused_in_one_sentence(monkeypatch):
    """JAX would have each process train the run by itself."""
    for name, text in open_mpi_5(1).items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri", raising=False)
    with pytest.raises(ConfigError, match=r"OMPI_COMM_WORLD_SIZE=2 .*--coordinator=HOST:PORT") as e:
        command_line.parse_rank(["train.py", "--connect_timeout=9", "--workdir=a"])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("flags", "environment", "rank"),
    [
        ({}, open_mpi_5(0) | {"OMPI_COMM_WORLD_SIZE": "1"}, Rank()),
        ({}, open_mpi_4(1, FIRST_PORT), Rank()),
        ({"num_processes": 1}, open_mpi_5(1), Rank(num_processes=1)),
        ({"coordinator": "a:1"}, open_mpi_5(1), Rank("a:1", 2, 1, local_id=1)),
        ({"coordinator": "a:1"}, open_mpi_4(1, FIRST_PORT), Rank("a:1", 2, 1, local_id=1)),
        (
            {"coordinator": "a:1", "num_processes": 4, "process_id": 3},
            open_mpi_5(1),
            Rank("a:1", 4, 3),
        ),
    ],
)
def test_rank_from_flags_and_open_mpi(flags, environment, rank):
    assert rank_from(flags, environment) == rank


def test_coordinator_alone_is_refused_outside_of_open_mpi():
    with pytest.raises(ConfigError, match=r"--num_processes and --process_id is missing"):
        rank_from({"coordinator": "a:1"}, {})
