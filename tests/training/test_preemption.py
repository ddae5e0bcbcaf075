"""Signals to a run in a process of its own: it saves, and says by its exit code why it left."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dynmoe_jax.command_line import EXIT_INTERRUPTED, EXIT_PREEMPTED
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.training.interrupt import Stopped, StopRequest, stop_on_signal

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@contextlib.contextmanager
def running(corpus, workdir, *flags):
    """A run without end, past its third step."""
    command = [
        *(sys.executable, "train.py", *flags),
        "--config=benchmarks/kill_config.py",
        f"--config.data.sources=text:{corpus}",
        f"--workdir={workdir}",
        "--config.model.vocab_size=300",
        "--config.train.steps=1000000",
        "--config.checkpoint.every_steps=1000000",
        "--config.evaluation.every_steps=0",
        "--config.checkpoint.keep_best=0",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed = ""
        while not re.search(r"^step +3/", printed, re.MULTILINE):
            line = process.stdout.readline()
            assert line, printed
            printed += line
        yield process
    finally:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("distributed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_sigterm_saves_the_step_it_came_in_and_exits_with_its_own_code(
    corpus, tmp_path, distributed
):
    """In a distributed run the signal is JAX's, and Orbax's hook tells at which step to stop."""
    place = (f"--coordinator=localhost:{free_port()}", "--num_processes=1", "--process_id=0")
    with running(corpus, tmp_path, *place * distributed) as process:
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_PREEMPTED, printed
    assert EXIT_PREEMPTED not in (0, 1, 2, EXIT_INTERRUPTED)
    step = int(re.search(r"Stopped after step ([\d,]+) and saved", printed)[1].replace(",", ""))
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, step + 1))


BUSY = """
import time
from dynmoe_jax.training.interrupt import StopRequest, stop_on_signal
stop = StopRequest()
with stop_on_signal(stop):
    print("ready", flush=True)
    while not stop.requested:
        pass
    print("first", stop.exit_code, flush=True)
    sum(range(10**13))  # no Python runs here that could answer a signal
"""


def test_second_ctrl_c_ends_at_once_whatever_is_under_way():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == f"first {EXIT_INTERRUPTED}\n"
        process.send_signal(signal.SIGTERM)  # of a scheduler that sends several: changes nothing
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def test_handlers_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    stop = StopRequest()
    with stop_on_signal(stop):
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == EXIT_PREEMPTED
        with pytest.raises(Stopped):
            stop.check()
    assert [signal.getsignal(number) for number in numbers] == before
