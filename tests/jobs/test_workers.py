"""Worker processes."""

import subprocess

import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.jobs.workers import Job, Worker, Workers


@pytest.mark.parametrize(
    ("inherited", "own", "flags"),
    [
        (None, "", ""),
        ("--a=1", "", "--a=1"),
        (None, "--b=2", "--b=2"),
        ("--a=1", "--b=2", "--a=1 --b=2"),
    ],
)
def test_a_worker_without_flags_gets_none(monkeypatch, tmp_path, inherited, own, flags):
    """XLA takes a blank for the name of a file with flags, and ends the process."""
    begun = {}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if inherited is not None:
        monkeypatch.setenv("XLA_FLAGS", inherited)
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: begun.update(options))
    Worker("module", tmp_path / "log.txt", (), own)
    assert begun["env"]["XLA_FLAGS"] == flags


def test_a_worker_that_ends_is_said_of_its_job_and_its_log(tmp_path):
    job = Job("train dense", lambda: {"kind": "train"}, 1.0)
    with (
        pytest.raises(ConfigError, match=r"^train dense: .* code 1; read in .*worker-0.txt why"),
        Workers("no_such_module_at_all", 1, tmp_path) as workers,
    ):
        workers.run([job], "recipe")
