"""The objective that turns hidden units off: its penalty by hand, on any mesh, and what it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.model import Decoder, decoder_structure
from dynmoe_jax.model.walk import walk
from dynmoe_jax.training.objectives.sparsify import Sparsify
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import StepGradients, TrainState, first_state, make_train_step

B, L, V, F = 8, 8, 32, 24


def settings(activation="relu", microbatches=1, every_n_layers=2, **sparsify):
    model = config.Model(
        num_layers=2,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        head_width=8,
        hidden_width=F,
        vocab_size=V,
        max_seq_len=L,
        init_std=0.3,
        activation=activation,
        moe=config.MoE(every_n_layers=every_n_layers, num_experts=4, hidden_width=8),
    )
    train = config.Train(
        steps=30,
        batch_size=B,
        microbatches=microbatches,
        objective="sparsify",
        sparsify={"weight": 0.02, **sparsify},
    )
    optimizer = config.Optimizer(learning_rate=1e-2, warmup_steps=1)
    return config.Config(model=model, data=config.Data(seq_len=L), train=train, optimizer=optimizer)


def batch():
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, V, (2, B, L)).astype(np.int32)
    segments = (np.arange(L) < np.array([8, 3, 8, 5, 1, 8, 0, 7])[:, None]).astype(np.int32)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "positions": positions}


def params_of(cfg):
    return nnx.state(Decoder(cfg.model, rngs=nnx.Rngs(params=jax.random.key(1))))


def computed(cfg, params, batch):
    """(gradients, parts of the loss) of a step."""
    gradients, (parts, _) = StepGradients(cfg)(TrainState(jnp.int32(0), params, None), batch)
    return gradients, parts


def sums_of(objective, units, valid=True):
    """(penalty, share that is off) of one token with these units."""
    activation_BLF = jnp.asarray(units, jnp.float32)[None, None]
    found = objective.activation_sums(activation_BLF, jnp.full((1, 1), valid))
    return [float(found[name][0]) for name in ("penalty_N", "off_N")]


def test_square_hoyer_is_one_of_one_unit_n_of_n_equal_ones_and_knows_no_scale():
    hoyer = Sparsify()
    assert sums_of(hoyer, [0, 0, 7, 0]) == [1.0, 0.75]
    assert sums_of(hoyer, [3.0] * 5) == pytest.approx([5.0, 0.0])
    units = np.array([0.5, -2.0, 1.0, 3.0])
    assert sums_of(hoyer, 1e3 * units) == pytest.approx(sums_of(hoyer, units), rel=1e-6)
    assert sums_of(hoyer, units)[0] == pytest.approx(4.5**2 / (0.25 + 1 + 9))
    assert sums_of(hoyer, [-1, -2, 0, 0]) == [0.0, 1.0]  # nothing is on
    assert sums_of(hoyer, [np.nan] * 4, valid=False) == [0.0, 0.0]
    gradient = jax.grad(lambda u: hoyer.activation_sums(u, jnp.ones((1, 1), bool))["penalty_N"][0])
    assert np.all(gradient(jnp.zeros((1, 1, 4))) == 0)


def test_l1_is_the_sum_of_what_is_on_and_units_may_be_off_below_another_number():
    assert sums_of(Sparsify(penalty="l1"), [0.5, -2.0, 1.0]) == pytest.approx([1.5, 1 / 3])
    moved = Sparsify(penalty="l1", off_below=-1.0)
    assert sums_of(moved, [0.5, -2.0, 1.0]) == pytest.approx([3.5, 1 / 3])


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_the_penalty_is_that_of_the_dense_layers_whatever_the_mesh_and_the_parts(activation):
    cfg, given = settings(activation), batch()
    params = params_of(cfg)
    gradients, parts = jax.jit(lambda p, b: computed(cfg, p, b))(params, given)

    # Independently: the dense layer's own input, its matrix, and a loop over tokens.
    decoder = nnx.merge(decoder_structure(cfg.model), params)
    outputs = dict(walk(decoder, given, lambda output: output.attended_BLD))
    (number,) = decoder.dense_layers[0]
    dense = decoder.groups.layers[number]
    name = "gate_up_D2F" if activation == "swiglu" else "up_DF"
    matrix = np.asarray(getattr(dense.feed_forward, name)[...][0])[:, :F]
    x_BLD = np.asarray(outputs[number], np.float64)
    scale = np.asarray(dense.feed_forward_norm.scale[...][0])
    normed = x_BLD / np.sqrt(np.square(x_BLD).mean(-1, keepdims=True) + cfg.model.norm_epsilon)
    unit = np.maximum(normed * scale @ matrix, 0)[given["segment_ids"] > 0]
    penalty = np.mean(unit.sum(-1) ** 2 / np.square(unit).sum(-1))
    np.testing.assert_allclose(parts["activation_penalty_N"], [penalty], rtol=1e-4)
    np.testing.assert_allclose(parts["zero_activations_N"], [(unit == 0).mean()], rtol=1e-4)

    train = dataclasses.replace(cfg.train, objective="language_model", sparsify={})
    plain = dataclasses.replace(cfg, train=train)
    without = jax.jit(lambda p, b: computed(plain, p, b)[1])(params, given)
    assert not {"activation_penalty_N", "zero_activations_N"} & without.keys()
    np.testing.assert_allclose(parts["loss"], without["loss"] + 0.02 * penalty, rtol=1e-5)

    halves = settings(activation, microbatches=2)
    mesh = make_mesh(config.Mesh(data=2, expert=2, model=2), B, jax.devices()[:8])
    with jax.set_mesh(mesh):
        placed = state_shardings(jax.eval_shape(lambda: params), mesh)
        spread = jax.device_put(params, placed), jax.device_put(given, batch_sharding(mesh))
        on_mesh = jax.jit(lambda p, b: computed(cfg, p, b))(*spread)
    for other in (jax.jit(lambda p, b: computed(halves, p, b))(params, given), on_mesh):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves((gradients, parts)), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-6)


def test_units_are_off_more_often_than_without_the_penalty():
    def off(weight):
        cfg = settings("relu", every_n_layers=0, weight=weight)
        schedule = make_schedule(cfg.optimizer, cfg.train.steps)
        optimizer = make_optimizer(cfg.optimizer, schedule)
        step = jax.jit(make_train_step(cfg, optimizer, schedule))
        state, given = first_state(cfg, optimizer, params_of(cfg)), batch()
        for _ in range(cfg.train.steps):
            state, metrics = step(state, given)
        return float(metrics["zero_activations_N"].mean()), float(metrics["lm_loss"])

    (sparse, loss), (control, control_loss) = off(0.05), off(0.0)
    assert sparse > control + 0.05
    assert max(loss, control_loss) < np.log(V)  # both have learned


def test_models_without_units_to_turn_off_are_refused():
    with pytest.raises(config.ConfigError, match="'sparsify' penalizes the units of dense"):
        settings(every_n_layers=1)
