"""Operations that end before they are done: a result is there as a whole, or not at all."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynmoe_jax.fields import ConfigError
from dynmoe_jax.runs.disk import DiskError
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.saving import streamed
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.perform import BrokenPromise
from tests.small_parent import operate

pytestmark = pytest.mark.slow

PLUGIN = '''
import dataclasses, os, signal
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.operations.stack import Stack

@OPERATIONS.register("killed")
@dataclasses.dataclass(frozen=True)
class Killed(Stack):
    """Ends in the middle of it all."""

    def array(self, place, given):
        if place.layer == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().array(place, given)
'''


@pytest.fixture
def array_of_upcycle(monkeypatch):
    """Has upcycling make the arrays that a function returns."""

    def make(function):
        original = Upcycle.array
        monkeypatch.setattr(Upcycle, "array", lambda *given: function(original, *given))

    return make


def upcycle(branches, to):
    return operate("upcycle", branches[0], to=to, num_experts=4)


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_a_broken_promise_leaves_nothing(branches, array_of_upcycle, tmp_path):
    def wrong(original, operation, place, given):
        array = original(operation, place, given)
        return 1.01 * array if place.expert == 2 and place.layer == 1 else array

    array_of_upcycle(wrong)
    with pytest.raises(BrokenPromise, match="promises logits that differ by at most 1e-05"):
        upcycle(branches, tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_what_an_operation_raises_is_not_the_disks_fault(branches, array_of_upcycle, tmp_path):
    for error in (ConfigError("--noise is too loud."), ZeroDivisionError("of its own")):
        array_of_upcycle(raising(error))
        with pytest.raises(type(error), match=str(error)):
            upcycle(branches, tmp_path / "to")
        assert not list(tmp_path.iterdir())


def test_a_parent_that_vanishes_is_named(branches, array_of_upcycle, tmp_path):
    """As where its training goes on, and keeps but the newest checkpoint."""
    parent = shutil.copytree(branches[0], tmp_path / "parent")

    def vanished(original, *given):
        shutil.rmtree(parent / "checkpoints", ignore_errors=True)
        return original(*given)

    array_of_upcycle(vanished)
    with pytest.raises(CheckpointError, match="parent/checkpoints/7 is not there any more"):
        upcycle([parent], tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_full_disk_is_a_sentence(branches, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("dynmoe_jax.surgery.perform.write_result", raising(full))
        with pytest.raises(DiskError, match="make room, and start the same command again"):
            upcycle(branches, tmp_path / "to")
    monkeypatch.setattr(streamed._Handler, "write_array", raising(full))
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        upcycle(branches, tmp_path / "to")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def _ctrl_c():
    """Has Ctrl-C do what it does in a command, wherever tests are started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_leaves_nothing(branches, array_of_upcycle, tmp_path):
    def interrupted(original, operation, place, given):
        if place.layer == 1 and place.expert == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(operation, place, given)

    array_of_upcycle(interrupted)
    with pytest.raises(KeyboardInterrupt):
        upcycle(branches, tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_a_killed_command_leaves_nothing_that_looks_like_a_result(branches, tmp_path):
    plugin, to = tmp_path / "own" / "plugin.py", tmp_path / "to"
    plugin.parent.mkdir()
    plugin.write_text(PLUGIN)
    command = [sys.executable, "-m", "dynmoe_jax.surgery", "killed", f"--plugin={plugin}"]
    flags = [f"--from={branches[0]}", f"--to={to}", "--times=2"]
    ended = subprocess.run([*command, *flags], cwd=Path(__file__).parents[2], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    left = [path.name for path in tmp_path.iterdir() if path != plugin.parent]
    assert len(left) == 1
    assert left[0].startswith("to.unfinished-")
    # The next one begins anew, and clears up.
    operate("stack", branches[0], to=to, times=2, tokens=1)
    assert {path.name for path in tmp_path.iterdir()} == {"own", "to"}


def test_an_operation_of_ones_own_is_an_operation(branches, tmp_path):
    """Derived from another one, it goes by its own name, and has flags, a plan and a record."""

    @dataclasses.dataclass(frozen=True)
    class Doubled(Upcycle):
        """Makes experts that are twice what they were."""

        def promise(self, parents):
            return None

        def array(self, place, given):
            return np.float32(1 + (place.expert is not None)) * super().array(place, given)

    with OPERATIONS.temporarily("doubled", Doubled):
        record = operate("doubled", branches[0], to=tmp_path / "to", num_experts=4)
    assert record["operation"] == "doubled"
    assert record["after"]["heldout_loss"] != record["before"]["heldout_loss"]
    assert load_run(tmp_path / "to")[0].model.moe_layers == (0, 1)
