"""Training that begins with a result: its moments, its first update, and what is resumed.

Axis legend: B batch, L positions.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.training.initial_model import initial_state, with_initial_model
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule, moments_of
from dynmoe_jax.training.step import init_state, make_train_step
from tests.small_parent import UPDATES, arrays_of, operate

pytestmark = pytest.mark.slow

GRANULARITY = 2


@pytest.fixture(scope="module")
def upcycled(branches, tmp_path_factory):
    """Four experts, of two copies cut in halves, whose down matrices are doubled."""
    folder = tmp_path_factory.mktemp("training") / "upcycled"
    shape = {"num_experts": 4, "granularity": GRANULARITY, "top_k": 2}
    operate("upcycle", branches[0], to=folder, tokens=1, **shape)
    return folder


@pytest.fixture(scope="module")
def begun(settings, change, upcycled, tmp_path_factory):
    """(settings, optimizer, shapes of the state, the state that training begins with)."""
    cfg = change(settings, train__init_from=str(upcycled), optimizer__clip_norm=1e6)
    cfg = with_initial_model(cfg, tmp_path_factory.mktemp("new"))
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    shapes = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    shapes = jax.tree.map(place, shapes)
    return cfg, optimizer, shapes, initial_state(cfg, optimizer, shapes)


def moments_by_hand(branches, path, shape):
    """(first, second) of an array of the result, from the numbers on the parent's disk."""
    halves, dense = {"gate_up_ED2F": "gate_up_D2F", "down_EFD": "down_FD"}, path[-1]
    found = []
    for power, group in enumerate(("first", "second"), 1):
        parent = arrays_of(branches[0], group)
        if dense == "router_DE":
            found.append(np.zeros(shape))
            continue
        values = parent[(*path[:-1], halves.get(dense, dense))].astype(np.float64)
        if dense == "down_EFD":
            parts = np.split(values, GRANULARITY, axis=1)
            values = np.stack(parts * 2, axis=1) / float(GRANULARITY) ** power
        elif dense == "gate_up_ED2F":
            gate, up = np.split(values, 2, axis=2)
            cut = [np.split(half, GRANULARITY, axis=2) for half in (gate, up)]
            parts = [np.concatenate(pair, axis=2) for pair in zip(*cut, strict=True)]
            values = np.stack(parts * 2, axis=1)
        found.append(values)
    return found


def test_the_first_update_is_adamws_with_the_parents_moments(begun, branches):
    cfg, optimizer, _, state = begun
    random = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)  # noqa: E731
    gradients = jax.tree.map(draw, state.params)
    updates, _ = jax.jit(optimizer.update)(gradients, state.optimizer, state.params)

    given: config.Optimizer = cfg.optimizer
    rate = given.learning_rate / (given.warmup_steps + 1)
    params, gradient = dict(state.params.flat_state()), dict(gradients.flat_state())
    assert any(path[-1] == "down_EFD" for path in params)
    for path, update in updates.flat_state():
        g = np.asarray(gradient[path][...], np.float64)
        first, second = moments_by_hand(branches, path, g.shape)
        first = given.b1 * first + (1 - given.b1) * g
        second = given.b2 * second + (1 - given.b2) * g**2
        count = UPDATES + 1
        step = first / (1 - given.b1**count)
        step /= np.sqrt(second / (1 - given.b2**count)) + given.epsilon
        if path[-1] != "scale":
            step += given.weight_decay * np.asarray(params[path][...])
        np.testing.assert_allclose(
            update[...], -rate * step, rtol=1e-4, atol=1e-8, err_msg=str(path)
        )


def test_a_step_is_resumed_bit_for_bit(begun, tokenizer, tmp_path):
    cfg, optimizer, shapes, state = begun
    step = jax.jit(make_train_step(cfg, optimizer, optax.constant_schedule(0.1)))
    random, L = np.random.default_rng(2), cfg.data.seq_len
    tokens_BL, targets_BL = random.integers(0, 300, (2, 2, L)).astype(np.int32)
    ones_BL, positions_BL = np.ones((2, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (2, 1))
    batch = dict(zip(BATCH_ARRAYS, (tokens_BL, targets_BL, ones_BL, positions_BL), strict=True))

    state, metrics = step(state, batch)
    assert (int(state.step), int(metrics["skipped_updates"])) == (1, 0)
    assert int(moments_of(state.optimizer).count) == UPDATES + 1
    with contextlib.closing(Checkpoints(tmp_path, config.Checkpoint())) as checkpoints:
        checkpoints.save(1, state, {"tokenizer": tokenizer.fingerprint}, cfg)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, shapes)
    jax.tree.map(np.testing.assert_array_equal, step(state, batch), step(restored, batch))
