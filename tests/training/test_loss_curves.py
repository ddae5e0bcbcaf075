"""The loss curve is that of one device on any number of them, whichever way tokens travel."""

import dataclasses

import jax
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, replicated, state_shardings
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

B, L, V, STEPS = 8, 16, 32, 12
MODEL = config.Model(
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=2,
    head_width=8,
    vocab_size=V,
    max_seq_len=L,
    init_std=0.3,
    moe=config.MoE(num_experts=8, hidden_width=8, top_p={"threshold": 0.6}),
)
CFG = config.Config(
    model=MODEL,
    data=config.Data(seq_len=L),
    loss=config.Loss(balance={"weight": 0.05}, entropy={"weight": 0.05}),
    train=config.Train(batch_size=B, steps=STEPS),
    optimizer=config.Optimizer(learning_rate=0.02, warmup_steps=0),
)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens_BL = rng.integers(0, V, (B, L)).astype(np.int32)
        yield {
            "tokens": tokens_BL,
            "targets": (tokens_BL + 1) % V,
            "segment_ids": np.ones((B, L), np.int32),
            "positions": np.broadcast_to(np.arange(L, dtype=np.int32), (B, L)),
        }


def loss_curve(transport, experts, devices):
    """The loss of each step; experts lie on ``experts`` of the devices."""
    moe = dataclasses.replace(MODEL.moe, transport=transport)
    cfg = dataclasses.replace(CFG, model=dataclasses.replace(MODEL, moe=moe))
    mesh = make_mesh(config.Mesh(expert=experts), B, jax.devices()[:devices])
    schedule = make_schedule(cfg.optimizer, STEPS)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    with jax.set_mesh(mesh):
        init = lambda key: init_state(cfg, optimizer, key)  # noqa: E731
        placed = state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
        state = jax.jit(init, out_shardings=placed)(jax.random.key(0))
        step = make_train_step(cfg, optimizer, schedule)
        step = jax.jit(step, donate_argnums=0, out_shardings=(placed, replicated(mesh)))
        losses = []
        for batch in batches():
            state, metrics = step(state, jax.device_put(batch, batch_sharding(mesh)))
            losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def one_device():
    losses = loss_curve("auto", 1, 1)
    assert losses[-1] < 0.8 * losses[0]  # it learns: curves of a model at rest would all agree
    return losses


@pytest.mark.parametrize(
    ("experts", "devices"), [pytest.param(2, 4, marks=pytest.mark.long), (8, 8)]
)
@pytest.mark.parametrize("transport", ["ring", "all_to_all"])
def test_is_that_of_one_device(transport, experts, devices, one_device):
    curve = loss_curve(transport, experts, devices)
    np.testing.assert_allclose(curve, one_device, rtol=1e-4)
