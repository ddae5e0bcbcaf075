"""One training step: its loss by hand, microbatches, meshes, the optimizer's fine print."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, replicated
from dynmoe_jax.model import Decoder, parameter_shapes
from dynmoe_jax.routing import RouterInput
from dynmoe_jax.routing.losses.balance import Balance
from dynmoe_jax.routing.losses.entropy import Entropy
from dynmoe_jax.routing.losses.router_z import RouterZ
from dynmoe_jax.training.optimizer import is_matrix, make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

MODEL = config.Model(
    num_layers=2,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    hidden_width=24,
    vocab_size=40,
    max_seq_len=16,
    init_std=0.3,
    moe=config.MoE(num_experts=4, hidden_width=12, top_p={"threshold": 0.5}),
)
CONFIG = config.Config(
    model=MODEL,
    data=config.Data(seq_len=16),
    train=config.Train(steps=10, batch_size=8),
    loss=config.Loss(
        entropy={"weight": 0.05}, router_z={"weight": 0.02}, z_weight=0.01, chunk_tokens=32
    ),
    optimizer=config.Optimizer(warmup_steps=0),
)


def draw_batch():
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 40, (2, 8, 16)).astype(np.int32)
    length = np.array([16, 9, 16, 3, 16, 16, 0, 5])
    segments = (np.arange(16) < length[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions,
    }


def one_step(cfg, batch, mesh=None):
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    state = init_state(cfg, optimizer, jax.random.key(0))
    step = make_train_step(cfg, optimizer, schedule)
    if mesh is None:
        return jax.jit(step)(state, batch)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, replicated(mesh))
        return jax.jit(step)(state, jax.device_put(batch, batch_sharding(mesh)))


@pytest.fixture(scope="module")
def whole():
    return one_step(CONFIG, draw_batch())


def assert_same(actual, wanted, rtol):
    for (path, a), w in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(wanted), strict=True
    ):
        a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
        assert np.linalg.norm(a - w) <= rtol * max(np.linalg.norm(w), 1e-6), path


def mean_over_layers(loss, routing):
    """A routing loss of a batch."""
    given = RouterInput(None, routing.by_layer.logits_TE, routing.valid_T)
    sums = loss.sums(routing.by_layer, given, {})
    return jnp.mean(loss.value(sums, jnp.sum(routing.valid_T)))


def test_loss_is_the_sum_of_its_parts_from_plain_formulas(whole):
    batch = draw_batch()
    decoder = Decoder(MODEL, rngs=nnx.Rngs(params=jax.random.key(0)))
    output = decoder(batch["tokens"], batch["segment_ids"], batch["positions"])
    valid = batch["segment_ids"] > 0
    nll = optax.softmax_cross_entropy_with_integer_labels(output.logits, batch["targets"])
    z = jnp.square(jax.nn.logsumexp(output.logits, axis=-1))
    lm, z = (jnp.sum(x * valid) / valid.sum() for x in (nll, z))
    balance, entropy, router_z = (
        mean_over_layers(loss, output.routing) for loss in (Balance(), Entropy(), RouterZ())
    )
    _, metrics = whole
    np.testing.assert_allclose(metrics["lm_loss"], lm, rtol=1e-5)
    np.testing.assert_allclose(metrics["balance_loss"], balance, rtol=1e-5)
    total = lm + 0.01 * z + 0.01 * balance + 0.05 * entropy + 0.02 * router_z
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    assert metrics["tokens"] == valid.sum()
    used = output.routing.experts_per_token
    np.testing.assert_array_equal(metrics["load_NE"].sum(axis=-1), used.sum(axis=(1, 2)))


def test_microbatches_of_uneven_token_counts_give_the_same_language_model_gradient():
    # Without the balance loss nothing is computed twice.
    cfg = dataclasses.replace(
        CONFIG, loss=dataclasses.replace(CONFIG.loss, balance={"weight": 0.0})
    )
    parts = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, microbatches=4))
    (one, one_metrics), (four, four_metrics) = (one_step(c, draw_batch()) for c in (cfg, parts))
    assert_same(four.params, one.params, 1e-5)
    for name in ("lm_loss", "entropy_loss", "router_z_loss", "grad_norm", "tokens", "load_NE"):
        np.testing.assert_allclose(four_metrics[name], one_metrics[name], rtol=1e-5)


def test_balance_loss_over_microbatches_is_weighted_by_their_tokens():
    cfg = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, microbatches=2),
        loss=dataclasses.replace(CONFIG.loss, balance={"over": "microbatch"}),
    )
    batch = draw_batch()
    _, metrics = one_step(cfg, batch)
    wanted = 0.0
    for half in (slice(0, None, 2), slice(1, None, 2)):
        part = {name: array[half] for name, array in batch.items()}
        decoder = Decoder(MODEL, rngs=nnx.Rngs(params=jax.random.key(0)))
        routing = decoder(part["tokens"], part["segment_ids"], part["positions"]).routing
        share = (part["segment_ids"] > 0).sum() / (batch["segment_ids"] > 0).sum()
        wanted += share * mean_over_layers(Balance(), routing)
    np.testing.assert_allclose(metrics["balance_loss"], wanted, rtol=1e-5)


def test_eight_devices_take_the_step_of_one(whole):
    mesh = make_mesh(config.Mesh(data=8), batch_size=8)
    state, metrics = one_step(CONFIG, draw_batch(), mesh)
    assert_same(state.params, whole[0].params, 1e-5)
    for name, wanted in whole[1].items():
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-5, err_msg=name)


def test_dense_model_takes_a_step():
    moe = dataclasses.replace(MODEL.moe, every_n_layers=0)
    cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, moe=moe))
    _, metrics = one_step(cfg, draw_batch())
    assert metrics["load_NE"].shape[0] == 0
    assert "balance_loss" not in metrics
    assert np.isfinite(metrics["loss"])


def test_mesh_that_does_not_fit_names_the_setting():
    with pytest.raises(
        config.ConfigError, match=r"config\.mesh asks for slice 1 x data 3 x .* there are 8"
    ):
        make_mesh(config.Mesh(data=3), batch_size=8)
    with pytest.raises(config.ConfigError, match=r"= 4 must be a multiple of the 8 devices"):
        make_mesh(config.Mesh(), batch_size=4)


def test_schedules_by_hand():
    peak = 1.0
    cosine = make_schedule(
        config.Optimizer(learning_rate=peak, warmup_steps=4, final_fraction=0.1), 104
    )
    # Warm-up starts at peak / 5; half-way down the cosine lies between peak and a tenth of it.
    np.testing.assert_allclose([cosine(0), cosine(4), cosine(54), cosine(104)], [0.2, 1, 0.55, 0.1])
    decay = make_schedule(
        config.Optimizer(
            learning_rate=peak, schedule="warmup_stable_decay", warmup_steps=10, final_fraction=0.0
        ),
        100,
    )
    np.testing.assert_allclose([decay(50), decay(80), decay(90), decay(100)], [1, 1, 0.5, 0])
    # A decay that would begin inside the warm-up begins after it, and still reaches its end.
    whole = config.Optimizer(
        learning_rate=peak, schedule="warmup_stable_decay", warmup_steps=20, decay_fraction=1.0
    )
    np.testing.assert_allclose(make_schedule(whole, 100)(100), 0.1, rtol=1e-5)
    constant = make_schedule(config.Optimizer(learning_rate=peak, schedule="constant"), 1000)
    np.testing.assert_allclose([constant(100), constant(999)], [1, 1])
    # A warm-up longer than half of the run is cut.
    short = make_schedule(config.Optimizer(learning_rate=peak, warmup_steps=100), 10)
    np.testing.assert_allclose([short(5), short(10)], [1, 0.1], rtol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
    params = parameter_shapes(dataclasses.replace(MODEL, attention_bias=True, qk_norm=True))
    decayed = {
        jax.tree_util.keystr(path): bool(value)
        for path, value in jax.tree.leaves_with_path(is_matrix(params))
    }
    assert {name for name, value in decayed.items() if not value} == {
        name for name in decayed if any(part in name for part in ("norm", "scale", "bias"))
    }
    assert not all(decayed.values())
