"""How a process is told of the others, and what it says when they do not come."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dynmoe_jax import command_line
from dynmoe_jax.cluster import agreement
from dynmoe_jax.cluster.joining import joined
from dynmoe_jax.cluster.rank import EXIT_PEER_LOST, Rank
from dynmoe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]


def parse(*arguments):
    return command_line.parse_rank(["train.py", *arguments])


def test_place_and_the_other_arguments():
    rank, rest = parse(
        "--coordinator=10.0.0.1:1234",
        "--config.train.steps=5",
        "--num_processes=4",
        "--workdir",
        "runs/a",
        "--process_id",
        "3",
    )
    assert rank == Rank("10.0.0.1:1234", 4, 3)
    assert rest == ["train.py", "--config.train.steps=5", "--workdir", "runs/a"]


def test_without_flags_jax_looks_for_the_cluster():
    rank, _ = parse("--workdir=a")
    assert rank == Rank()
    assert not rank.is_alone
    assert parse("--num_processes=1")[0].is_alone


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--coordinator=a:1"], r"--num_processes and --process_id is missing; give .* together"),
        (["--coordinator=a:1", "--process_id=0"], r"^--num_processes is missing"),
        (["--num_processes=2"], r"--coordinator and --process_id is missing"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], r"=a must be HOST:PORT"),
        (["--coordinator=a:0", "--num_processes=2", "--process_id=0"], r"must be HOST:PORT"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], r"=2 must be one of 0\.\.1"),
        (
            ["--coordinator=a:1", "--num_processes=2", "--process_id=-1"],
            r"=-1 must be one of 0\.\.",
        ),
        (["--coordinator=a:1", "--num_processes=0", "--process_id=0"], r"=0 must be at least 1"),
        (["--process_id=one"], r"--process_id=one must be a whole number: which of them this is"),
        (["--num_processes"], r"--num_processes= must be a whole number"),
        (["--connect_timeout=0"], r"--connect_timeout=0 must be at least 1"),
    ],
)
def test_flags_that_make_no_place_are_refused_in_one_sentence(arguments, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)


def test_misspelt_flag_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean --num_processes"):
        command_line.parse(["train.py", "--num_proceses=2"])


def test_process_by_itself_joins_nothing():
    with joined(Rank(), exits := []):
        assert not jax.distributed.is_initialized()
        assert agreement.is_first()
        assert not agreement.has_peers()
        assert agreement.broadcast({"a": 1}) == {"a": 1}
        assert agreement.gather(3) == [3]
        assert agreement.on_first(lambda: 4) == 4
    assert exits == []


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (0, r"Not all of the 2 processes have come within --connect_timeout=1 seconds"),
        (1, r"Process 0 and the others were not reached at --coordinator=localhost:\d+ within"),
    ],
)
def test_who_is_left_alone_says_what_to_check(number, sentence):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "train.py", f"--coordinator=localhost:{port}", "--num_processes=2"),
            *(f"--process_id={number}", "--connect_timeout=1"),
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == EXIT_PEER_LOST, done.stderr
    assert re.search(sentence, done.stderr)
    assert "Traceback" not in done.stderr
    assert "stack trace" not in done.stderr
