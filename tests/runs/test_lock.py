"""Two runs in one folder would overwrite each other's checkpoints: the second is refused."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from dynmoe_jax import config
from dynmoe_jax.runs import lock

HOLD = """
import sys
from pathlib import Path
from dynmoe_jax.runs.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_process(workdir):
    """Holds the folder until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_second_process_is_refused_with_the_pid_and_host_of_the_first(tmp_path):
    with another_process(tmp_path) as process:
        holder = rf"in use by process {process.pid} on host {socket.gethostname()}, since \d{{4}}-"
        for _ in range(2):  # the first refusal must not spoil the text
            with pytest.raises(config.ConfigError, match=holder) as caught, lock.locked(tmp_path):
                pass
        assert "\n" not in str(caught.value)


def test_killed_process_leaves_no_lock(tmp_path):
    with another_process(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with lock.locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / lock.FILE_NAME).read_text()


def test_the_folder_is_free_after_the_run(tmp_path):
    for _ in range(2):
        with lock.locked(tmp_path):
            pass


def test_holder_that_has_not_yet_said_who_it_is(tmp_path):
    with (tmp_path / lock.FILE_NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused = pytest.raises(config.ConfigError, match="another process, which has only just")
        with refused, lock.locked(tmp_path):
            pass


def test_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock.locked(tmp_path):
        assert "knows no locks (No locks available)" in capsys.readouterr().out


@contextlib.contextmanager
def ordinary_user():
    """Root may write everywhere; nobody else may."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_folder_is_refused_in_one_sentence(tmp_path):
    tmp_path.chmod(0o555)
    refused = pytest.raises(config.ConfigError, match=r"cannot be written \(.*denied\); name ano")
    with ordinary_user(), refused, lock.locked(tmp_path):
        pass
