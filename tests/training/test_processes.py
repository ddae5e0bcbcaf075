"""Two processes train one run: the same batches and losses as one, whatever becomes of either."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.kill_campaign import newest_checkpoint
from dynmoe_jax.cluster.rank import EXIT_PEER_LOST
from dynmoe_jax.command_line import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_PREEMPTED
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAMES = ("tokens", "targets", "segment_ids", "positions")
HEARTBEAT_S = 10
STEPS, BATCH, EVERY = 20, 16, 6
PATIENCE_S = 60

# Starts train.py, and writes down what its devices get of every batch.  A step takes 2 ms, so the
# run waits before one of them until it is released: what happens to it happens at that step.
DRIVER = f"""
import pathlib, runpy, sys, time
import numpy as np
from dynmoe_jax.training.feed import Feed

folder, hold, place = pathlib.Path(sys.argv.pop(1)), int(sys.argv.pop(1)), Feed.place

def record(feed, batch):
    placed = place(feed, batch)
    position = feed.stream.get_state()["position"]["row"]
    step = -(-position // {BATCH})
    while step == hold and not (folder / f"released_{{hold}}").exists():
        time.sleep(0.01)
    if hold and step > hold:
        time.sleep(0.1)  # a signal takes its time from one process to the other
    shards = zip(*(placed[name].addressable_shards for name in {NAMES}), strict=True)
    for parts in shards:
        row = parts[0].index[0].start or 0
        np.save(folder / f"{{step}}_{{row}}.npy", np.stack([part.data for part in parts]))
    return placed

Feed.place = record
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def arguments(corpus, workdir):
    """A tiny quickstart."""
    return [
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        f"--config.data.sources=text:{corpus}",
        "--config.data.seq_len=32",
        "--config.data.shuffle_tokens=2048",
        "--config.model.num_layers=1",
        "--config.model.width=16",
        "--config.model.head_width=8",
        "--config.model.num_heads=2",
        "--config.model.num_kv_heads=2",
        "--config.model.vocab_size=300",
        "--config.model.moe.num_experts=4",
        "--config.model.moe.hidden_width=16",
        f"--config.train.steps={STEPS}",
        f"--config.train.batch_size={BATCH}",
        "--config.train.log_every_steps=1",
        f"--config.checkpoint.every_steps={EVERY}",
        "--config.evaluation.max_batches=2",
        "--config.evaluation.sample_tokens=4",
        "--config.logging.tensorboard=False",
    ]


def travelling(transport):
    """Settings of two processes that each have half of the experts."""
    return ["--config.mesh.expert=2", f"--config.model.moe.transport={transport}"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Processes:
    """Some processes of one run, of one device each."""

    def __init__(self, count, corpus, workdir, batches, changes, own, hold):
        environment = os.environ | {
            "XLA_FLAGS": re.sub(r"--xla_force\S+", "", os.environ["XLA_FLAGS"]),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        batches.mkdir(exist_ok=True)
        self._workdir, self._hold, self._released = workdir, hold, batches / f"released_{hold}"
        driver = [sys.executable, "-c", DRIVER, str(batches), str(hold)]
        self.printed = [""] * count
        place = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
        place += [f"--heartbeat_timeout={HEARTBEAT_S}"]
        self.each = [
            subprocess.Popen(
                [*driver, *arguments(corpus, workdir), *changes]
                + [*place, f"--process_id={number}"] * (count > 1)
                + [*own] * number,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(count)
        ]

    def wait_there(self):
        """Waits until the run waits, and what it has saved is on disk; returns the step of that."""
        shown = self._hold - 2  # a step is shown when the next one has been dispatched
        while not re.search(rf"^step +{shown}/", self.printed[0], re.MULTILINE):
            line = self.each[0].stdout.readline()
            assert line, self.printed[0] + self.each[-1].communicate()[0]
            self.printed[0] += line
        due, since = shown // EVERY * EVERY, time.monotonic()
        while newest_checkpoint(self._workdir) < due:
            assert time.monotonic() - since < PATIENCE_S, self.printed
            time.sleep(0.01)
        return newest_checkpoint(self._workdir)

    def release(self):
        """Lets the run go on."""
        self._released.touch()

    def end(self):
        """The exit codes."""
        for number, process in enumerate(self.each):
            self.printed[number] += process.communicate(timeout=120)[0]
        return [process.returncode for process in self.each]


@contextlib.contextmanager
def running(count, corpus, workdir, batches, *changes, own=(), hold=0):
    """``changes`` of settings are those of all processes, ``own`` those of the second.

    The run waits before step ``hold``; not at all if that is 0.
    """
    processes = Processes(count, corpus, workdir, batches, changes, own, hold)
    try:
        yield processes
    finally:
        for process in processes.each:
            process.kill()
            process.communicate()


def batches_in(folder):
    """{step: [names, B, L]} of what all devices got; every row once."""
    parts = {}
    for path in sorted(folder.glob("*.npy"), key=lambda path: int(path.stem.split("_")[1])):
        parts.setdefault(int(path.stem.split("_")[0]), []).append(np.load(path))
    return {step: np.concatenate(rows, axis=1) for step, rows in parts.items()}


def assert_same_run(workdir, one):
    lines, wanted = read_metrics(workdir), read_metrics(one)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "experts_per_token"):
        actual, desired = ([line[name] for line in some] for some in (lines, wanted))
        np.testing.assert_allclose(actual, desired, rtol=1e-4, err_msg=name)
    heldout, desired = read_summary(workdir).heldout, read_summary(one).heldout
    np.testing.assert_allclose(heldout.loss, desired.loss, rtol=1e-4)
    assert heldout.unigram_entropy == desired.unigram_entropy
    positions = []
    for folder in (workdir, one):
        with contextlib.closing(Checkpoints(folder, None)) as checkpoints:
            positions.append(checkpoints.position(STEPS))
    assert positions[0] == positions[1]


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """(workdir, batches) of an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("one")
    with running(1, corpus, folder / "run", folder / "batches") as process:
        assert process.end() == [0], process.printed
    return folder / "run", batches_in(folder / "batches")


@pytest.mark.long
def test_run_moves_between_two_processes_and_one(one, corpus, tmp_path):
    """2, then 1, then 2; each time stopped by Ctrl-C, which one process alone gets."""
    workdir, batches = tmp_path / "run", tmp_path / "batches"
    with running(2, corpus, workdir, batches, hold=6) as processes:
        processes.wait_there()
        processes.each[1].send_signal(signal.SIGINT)
        processes.release()
        assert processes.end() == [EXIT_PREEMPTED, EXIT_INTERRUPTED], processes.printed
    stopped = int(re.search(r"Stopped after step (\d+) and saved", processes.printed[0])[1])
    assert not re.search(r"^step|New run|Stopped", processes.printed[1], re.MULTILINE)
    with running(1, corpus, workdir, batches, hold=stopped + 3) as process:
        process.wait_there()
        process.each[0].send_signal(signal.SIGINT)
        process.release()
        assert process.end() == [EXIT_INTERRUPTED], process.printed
    with running(2, corpus, workdir, batches) as processes:
        assert processes.end() == [0, 0], processes.printed
    assert_same_run(workdir, one[0])
    seen = batches_in(batches)
    assert seen.keys() == one[1].keys() == set(range(1, STEPS + 1))
    for step, batch in seen.items():
        np.testing.assert_array_equal(batch, one[1][step], err_msg=f"step {step}")


def killed(processes, victim):
    """Kills one process; the other must notice, and say so, in time.

    Returns the step of the newest checkpoint that is left.
    """
    saved = processes.wait_there()
    processes.each[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    processes.release()
    codes = processes.end()
    # Without the heartbeat, and without gloo's word, it would wait for ever.
    assert time.monotonic() - since < 3 * HEARTBEAT_S
    other = 1 - victim
    assert codes[victim] == -signal.SIGKILL
    printed = processes.printed[other]
    # JAX ends a process itself where it hears first that the other one is gone.
    assert codes[other] in (EXIT_PEER_LOST, -signal.SIGABRT), printed
    told = rf"error: process {other} on \S+: The connection to the other processes is lost"
    told = told if codes[other] == EXIT_PEER_LOST else "JAX distributed service detected fatal"
    assert re.search(told, printed), printed
    assert "Traceback" not in printed
    return saved


def test_run_of_two_processes_goes_on_in_one_when_the_other_was_killed(one, corpus, tmp_path):
    """Each process has half of the experts, and tokens travel between them."""
    workdir, before, after = (tmp_path / name for name in ("run", "before", "after"))
    with running(2, corpus, workdir, before, *travelling("all_to_all"), hold=11) as processes:
        saved = killed(processes, victim=1)
    with running(1, corpus, workdir, after) as process:
        assert process.end() == [0], process.printed
    assert f"after step {saved}, on" in process.printed[0]
    assert_same_run(workdir, one[0])
    assert batches_in(after).keys() == set(range(saved + 1, STEPS + 1))
    # Of the step in which it was killed, the process has not written its part.
    seen = batches_in(before) | batches_in(after)
    for step, batch in seen.items():
        np.testing.assert_array_equal(batch, one[1][step], err_msg=f"step {step}")


@pytest.mark.long
def test_killed_process_stops_the_other_and_both_resume(one, corpus, tmp_path):
    """Process 0 holds the coordinator, so its end shows in another way than that of process 1.

    Each process has half of the experts, and tokens travel between them, by either transport.
    """
    workdir, batches = tmp_path / "run", tmp_path / "batches"
    with running(2, corpus, workdir, batches, *travelling("ring"), hold=11) as processes:
        first = killed(processes, victim=1)
    with running(2, corpus, workdir, batches, *travelling("all_to_all"), hold=16) as processes:
        second = killed(processes, victim=0)
    assert 0 < first < second
    assert f"after step {first}, on" in processes.printed[0]
    with running(2, corpus, workdir, batches, *travelling("all_to_all")) as processes:
        assert processes.end() == [0, 0], processes.printed
    assert f"after step {second}, on" in processes.printed[0]
    assert_same_run(workdir, one[0])
    for step, batch in batches_in(batches).items():
        np.testing.assert_array_equal(batch, one[1][step], err_msg=f"step {step}")


def test_processes_with_other_settings_than_the_first_are_refused(corpus, tmp_path):
    workdir, batches = tmp_path / "run", tmp_path / "batches"
    with running(2, corpus, workdir, batches, own=["--config.seed=1"]) as processes:
        codes = processes.end()
    assert codes == [EXIT_PEER_LOST, EXIT_BAD_INPUT], processes.printed
    refused = "config.seed=1 is 0 in process 0; start all processes with the same settings."
    assert f"error: {refused}" in processes.printed[1]
    assert re.search(rf"Process 1 on \S+ has stopped: {re.escape(refused)}", processes.printed[0])


def test_error_in_one_process_stops_both_with_its_sentence(one, corpus, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one[0], workdir)
    with running(2, corpus, workdir, tmp_path / "batches", "--config.model.width=24") as processes:
        codes = processes.end()
    assert codes == [EXIT_BAD_INPUT, EXIT_PEER_LOST], processes.printed
    assert "error: config.model.width=24 differs from 16" in processes.printed[0]
    assert "Process 0 on" in processes.printed[1]
    assert "config.model.width=24 differs from 16" in processes.printed[1]
    assert "Traceback" not in "".join(processes.printed)
