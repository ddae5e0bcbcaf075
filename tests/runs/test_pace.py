"""Checkpoints that are written slowly beside the steps, and fast once somebody waits."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.runs.checkpoint import FOLDER, Checkpoints
from dynmoe_jax.runs.recovery import recover
from dynmoe_jax.runs.saving import pace as pace_module
from dynmoe_jax.runs.saving.pace import Pace

NEVER = 1e-3
"""Bytes per second at which a checkpoint does not come to its end within a test."""


@pytest.fixture
def waits(monkeypatch):
    """The pauses of every Pace, which are not made."""
    seconds = []
    monkeypatch.setattr(pace_module.threading.Event, "wait", lambda _, time: seconds.append(time))
    return seconds


def test_pauses_by_hand(waits):
    pace = Pace(1000.0)
    pace.after_writing(500)
    pace.after_summing(400)  # a byte costs a quarter of what writing it does
    assert waits == [0.5, 0.1]
    assert pace.pauses


def test_large_state_is_written_within_minutes(waits):
    pace = Pace(1000.0)
    pace.begin(200_000)  # 200 s at the usual rate
    pace.after_writing(1000)
    pace.begin(600_000)  # 600 s, so twice as fast
    pace.after_writing(1000)
    assert waits == [1.0, 0.5]


def test_accelerators_know_no_pauses(waits, monkeypatch):
    assert Pace.of_this_machine().pauses
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    pace = Pace.of_this_machine()
    pace.after_writing(10**12)
    assert not pace.pauses
    assert waits == []


@pytest.fixture
def slow(monkeypatch):
    """Checkpoints are written so slowly that only somebody who waits for them gets them."""
    monkeypatch.setattr(pace_module, "_LONGEST_S", 1e9)
    monkeypatch.setattr(Pace, "of_this_machine", classmethod(lambda cls: cls(NEVER)))


def finished(workdir):
    """The checkpoints that a run would find that is started after a kill now."""
    return {path.name for path in (workdir / FOLDER).iterdir() if path.name.isdigit()}


def draw(seed):
    values = np.random.default_rng(seed).normal(size=(2, 1000)).astype(np.float32)
    return {"a": jnp.asarray(values[0]), "b": jnp.asarray(values[1])}


add_one = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)


def test_slow_checkpoint_is_not_there_until_it_is_whole_and_holds_the_step_it_was_taken_at(
    slow, tmp_path
):
    checkpoints = Checkpoints(tmp_path, config.Checkpoint(keep=5))
    state = draw(0)
    checkpoints.save(1, state, {"row": 1}, config.Config())
    checkpoints.wait()
    for _ in range(3):  # to memory that the checkpoint has not read yet
        state = add_one(state)
    checkpoints.save(4, state, {"row": 4}, config.Config())
    taken = jax.device_get(state)
    state = add_one(state)
    assert checkpoints.is_saving()
    checkpoints.check()  # does not wait
    assert checkpoints.is_saving()
    assert finished(tmp_path) == {"1"}
    checkpoints.close()  # waits, or the test would not end
    again = Checkpoints(tmp_path, config.Checkpoint())
    assert recover(again) == 4
    restored, position = again.restore(4, state)
    again.close()
    assert position == {"row": 4}
    jax.tree.map(np.testing.assert_array_equal, restored, taken)


def test_next_checkpoint_does_not_wait_for_the_pauses_of_the_one_before(slow, tmp_path):
    checkpoints = Checkpoints(tmp_path, config.Checkpoint(keep=5))
    for step in (1, 2, 3):
        checkpoints.save(step, draw(step), {}, config.Config())
    assert checkpoints.is_saving()  # with pauses again
    assert finished(tmp_path) == {"1", "2"}
    checkpoints.close()
    again = Checkpoints(tmp_path, None)
    for step in (1, 2, 3):
        restored, _ = again.restore(step, draw(0))
        jax.tree.map(np.testing.assert_array_equal, restored, draw(step))
    again.close()


def test_arrays_are_written_at_once_when_somebody_waits(monkeypatch):
    """One by one, hundreds of small pieces take seconds in which nothing is computed."""
    pace = Pace(1000.0)
    monkeypatch.setattr(pace, "after_writing", lambda num_bytes: None)

    async def begun_after(releases_first):
        turns, begun = pace_module._Turns(pace), []

        async def write(number):
            await turns.wait_for_bytes(1)
            begun.append(number)

        tasks = [asyncio.create_task(write(number)) for number in range(4)]
        await asyncio.sleep(0)
        assert begun == [0]
        await releases_first(turns)
        for _ in range(3):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return begun

    async def in_peace(turns):
        await turns.release_bytes(1)

    async def in_a_hurry(turns):
        with pace.waited_for():
            await turns.release_bytes(1)

    async def after_one_was_cancelled(turns):
        turns._waiting[0].cancel()
        await turns.release_bytes(1)

    assert asyncio.run(begun_after(in_peace)) == [0, 1]
    assert asyncio.run(begun_after(after_one_was_cancelled)) == [0, 2]
    assert asyncio.run(begun_after(in_a_hurry)) == [0, 1, 2, 3]
