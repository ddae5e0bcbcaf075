"""Bad numbers inside the step: what is skipped, what stays, what counts as a spike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import LEARNED
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, replicated
from dynmoe_jax.training.health.guard import FEWEST_LOSSES, WINDOW, new_guard, spike_bound, watch
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

POISONED = 39
"""A token whose embedding is NaN: batches without it are sound, batches with it are not."""
MODEL = config.Model(
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    vocab_size=40,
    max_seq_len=8,
    init_std=0.3,
    moe=config.MoE(num_experts=4, hidden_width=12, top_p={"threshold": 0.5}, backend="reference"),
)
CONFIG = config.Config(
    model=MODEL,
    data=config.Data(seq_len=8),
    train=config.Train(steps=10, batch_size=8, max_skipped_in_a_row=3),
    optimizer=config.Optimizer(warmup_steps=4),
)
SETUPS = {"whole": (1, 1), "microbatches": (4, 1), "devices": (1, 8)}


def draw_batch(poisoned):
    """Random tokens, the poisoned one in the last sequence alone."""
    tokens, targets = np.random.default_rng(0).integers(0, POISONED, (2, 8, 8)).astype(np.int32)
    if poisoned:
        tokens[7, 3] = POISONED
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.ones((8, 8), np.int32),
        "positions": np.broadcast_to(np.arange(8, dtype=np.int32), (8, 8)),
    }


@pytest.fixture(scope="module", params=SETUPS)
def setup(request):
    """(state with a poisoned parameter, jitted step, placed sound batch, placed bad batch)."""
    microbatches, devices = SETUPS[request.param]
    train = dataclasses.replace(CONFIG.train, microbatches=microbatches)
    cfg = dataclasses.replace(CONFIG, train=train)
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = init_state(cfg, optimizer, jax.random.key(0))
    embedding = state.params["embedding_VD"]
    embedding[...] = embedding[...].at[POISONED].set(jnp.nan)
    step = jax.jit(make_train_step(cfg, optimizer, schedule))
    batches = draw_batch(False), draw_batch(True)
    if devices == 1:
        yield state, step, *batches
        return
    mesh = make_mesh(config.Mesh(data=devices), batch_size=8)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, replicated(mesh))
        yield state, step, *jax.device_put(batches, batch_sharding(mesh))


def run(setup, *bad):
    """The states and metrics after steps on bad (True) and sound (False) batches."""
    state, step, sound_batch, bad_batch = setup
    states, metrics = [state], []
    for is_bad in bad:
        state, numbers = step(state, bad_batch if is_bad else sound_batch)
        states.append(state)
        metrics.append(jax.device_get(numbers))
    return states, metrics


def bits(state):
    """Parameters and optimizer as bytes: equal NaNs are equal, 0 and -0 are not."""
    leaves = jax.tree.leaves((state.params, state.optimizer))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_bad_step_changes_nothing_but_the_counts(setup):
    (before, _, after), (_, metrics) = run(setup, False, True)[0], run(setup, False, True)[1]
    states, _ = run(setup, False)
    assert bits(after) == bits(states[1]) != bits(before)
    assert int(after.step) == 2
    assert not np.isfinite(metrics["loss"])
    assert (metrics["skipped_updates"], metrics["skipped_in_a_row"]) == (1, 1)


def test_training_goes_on_as_if_the_bad_step_had_not_been(setup):
    states, metrics = run(setup, False, True, False)
    clean, clean_metrics = run(setup, False, False)
    assert bits(states[3]) == bits(clean[2])
    assert (metrics[2]["skipped_updates"], metrics[2]["skipped_in_a_row"]) == (1, 0)
    # The optimizer's count stands still, so the warm-up does too.
    assert metrics[2]["learning_rate"] == clean_metrics[1]["learning_rate"]
    np.testing.assert_array_equal(states[3].guard.recent_W, clean[2].guard.recent_W)


def test_after_the_limit_even_a_sound_batch_changes_nothing(setup):
    """The host reads one step late and must find the parameters that failed."""
    states, metrics = run(setup, True, True, True, False)
    assert [m["skipped_in_a_row"] for m in metrics] == [1, 2, 3, 4]
    assert bits(states[4]) == bits(states[0])
    states, metrics = run(setup, True, True, False)
    assert metrics[2]["skipped_in_a_row"] == 0
    assert bits(states[3]) != bits(states[0])


def losses(*values):
    """A window with these as the newest."""
    recent = np.full(WINDOW, np.nan, np.float32)
    recent[WINDOW - len(values) :] = values
    return jnp.asarray(recent)


def test_bound_by_hand():
    # 32 losses: half 2, a quarter 1 and 3 each.  Median 2, absolute deviations 0 and 1 in equal
    # numbers: MAD 0.5, a robust deviation of 0.7413.
    values = [2.0] * 16 + [1.0] * 8 + [3.0] * 8
    np.testing.assert_allclose(spike_bound(losses(*values), 4.0), 2 + 4 * 0.7413, rtol=1e-6)
    # Where nothing varies, a twentieth above the median is the least.
    np.testing.assert_allclose(spike_bound(losses(*[2.0] * 32), 4.0), 2.1, rtol=1e-6)
    # A few wild losses move neither median nor MAD, which is why they are taken.
    np.testing.assert_allclose(spike_bound(losses(*values, 1e6), 4.0), 2 + 4 * 1.4826, rtol=1e-6)


def test_few_losses_are_no_measure():
    assert spike_bound(losses(*[1.0] * (FEWEST_LOSSES - 1)), 4.0) == np.inf
    assert spike_bound(losses(*[1.0] * FEWEST_LOSSES), 4.0) < np.inf
    assert spike_bound(losses(), 4.0) == np.inf


def watched(values, norms=None):
    guard, rows = new_guard(), []
    step = jax.jit(watch, static_argnums=3)
    for loss, norm in zip(values, norms or [1.0] * len(values), strict=True):
        update, guard = step(guard, jnp.float32(loss), jnp.float32(norm), CONFIG.train)
        rows.append((bool(update), int(guard.skipped), int(guard.spike_steps)))
    return guard, rows


def test_losses_above_the_bound_are_counted_in_a_row():
    quiet = [2.0] * FEWEST_LOSSES
    _, rows = watched([*quiet, 3.0, 3.0, 2.0, 3.0, np.nan, 3.0])
    # A loss that is not finite neither adds to a row nor ends it.
    assert [row[2] for row in rows[-6:]] == [1, 2, 0, 1, 1, 2]


def test_losses_before_other_text_begins_are_no_measure():
    data = config.Data(seq_len=8, corruption="ul2", ul2={"until_step": 50})
    cfg = dataclasses.replace(CONFIG, data=data)
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = init_state(cfg, optimizer, jax.random.key(0))
    low = dataclasses.replace(state.guard, recent_W=jnp.full(WINDOW, 0.1), spike_steps=jnp.int32(2))
    step = jax.jit(make_train_step(cfg, optimizer, schedule))
    batch = draw_batch(False) | {LEARNED: np.ones((8, 8), np.int32)}
    counts = {}
    for number in (49, 50, 51):
        _, metrics = step(dataclasses.replace(state, guard=low, step=jnp.int32(number)), batch)
        counts[number] = int(metrics["spike_steps"])
    assert counts == {49: 3, 50: 0, 51: 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_either_number_being_bad_skips(bad):
    guard, rows = watched([1.0, bad, 1.0], [1.0, 1.0, bad])
    assert rows == [(True, 0, 0), (False, 1, 0), (False, 2, 0)]
    assert guard.recent_W[-1] == 1.0
    assert np.isnan(guard.recent_W[:-1]).all()


def test_window_forgets_the_oldest():
    guard, _ = watched([*range(WINDOW + 2)])
    np.testing.assert_array_equal(guard.recent_W, np.arange(2, WINDOW + 2))
