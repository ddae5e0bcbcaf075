"""States of routers and controllers in training: batches cut anyhow, skips, noise, resuming."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.model import decoder_shapes
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import TopK
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.router_states import shown_states
from dynmoe_jax.training.step import init_state, make_train_step

B, L, V = 8, 12, 32

CASES = {
    "sigmoid_bias": {"router": "sigmoid_bias", "sigmoid_bias": {"k": 2, "rate": 0.01}},
    "budget": {"top_p": {"experts_per_token": 1.5, "max_threshold": 0.9}},
    "relu": {"router": "relu", "relu": {"experts_per_token": 1.0}},
}


def settings(moe, microbatches=1, mesh=None, loss=None, **train):
    model = config.Model(
        num_layers=2,
        width=8,
        num_heads=2,
        num_kv_heads=2,
        head_width=4,
        vocab_size=V,
        max_seq_len=L,
        init_std=0.3,
        moe=config.MoE(num_experts=4, hidden_width=8, **moe),
    )
    return dataclasses.replace(
        config.Config(),
        model=model,
        loss=loss or config.Loss(),
        data=config.Data(seq_len=L),
        train=config.Train(batch_size=B, microbatches=microbatches, steps=10, **train),
        mesh=mesh or config.Mesh(),
    )


def batch():
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, V, (B, L + 1))
    segments = np.ones((B, L), int)
    segments[0, 7:] = 0
    positions = np.tile(np.arange(L), (B, 1))
    arrays = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments}
    return {k: jnp.asarray(v, jnp.int32) for k, v in (arrays | {"positions": positions}).items()}


@functools.cache
def parts(cfg):
    """(first state of a key, next state and metrics), each compiled once."""
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    init = lambda key: init_state(cfg, optimizer, key)  # noqa: E731
    step = make_train_step(cfg, optimizer, schedule)
    if cfg.mesh == config.Mesh():
        return jax.jit(init), jax.jit(step)
    mesh = make_mesh(cfg.mesh, B // cfg.train.microbatches)
    with jax.set_mesh(mesh):
        placed = state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    return jax.jit(init, out_shardings=placed), jax.jit(step)


@functools.cache
def history(cfg, count=2):
    """States before each step and after the last one, metrics of each step."""
    alone = cfg.mesh == config.Mesh()
    mesh = None if alone else make_mesh(cfg.mesh, B // cfg.train.microbatches)
    with contextlib.nullcontext() if alone else jax.set_mesh(mesh):
        init, step = parts(cfg)
        data = batch() if alone else jax.device_put(batch(), batch_sharding(mesh))
        states, metrics = [init(jax.random.key(0))], []
        for _ in range(count):
            state, of_step = step(states[-1], data)
            states.append(state)
            metrics.append(of_step)
    return states, metrics


def steps(cfg, count=2):
    """(state, metrics of the last step)."""
    states, metrics = history(cfg, count)
    return states[-1], metrics[-1]


def moving(state):
    """States of routers and of controllers."""
    names = ("bias_E", "threshold")
    flat = [leaf[...] for path, leaf in state.params.flat_state() if path[-1] in names]
    return jax.device_get(flat + jax.tree.leaves(state.controllers))


@pytest.mark.parametrize("case", CASES)
def test_a_batch_cut_in_two_gives_the_same_new_state(case):
    whole, _ = steps(settings(CASES[case]))
    cut, _ = steps(settings(CASES[case], microbatches=2))
    assert moving(whole)
    start = moving(history(settings(CASES[case]))[0][0])
    for a, b, before in zip(moving(whole), moving(cut), start, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert not np.array_equal(a, before)


@pytest.mark.parametrize("case", ["sigmoid_bias", "budget"])
def test_eight_devices_give_the_same_new_state(case):
    mesh = config.Mesh(data=2, expert=2, model=2)
    alone, one = steps(settings(CASES[case]))
    together, eight = steps(settings(CASES[case], mesh=mesh))
    np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-5)
    for a, b in zip(moving(alone), moving(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_skipped_update_leaves_states_as_they_were():
    cfg = settings(CASES["sigmoid_bias"], loss=config.Loss(balance={"weight": 0.01, "controller":
                                                           "drop_rate"}))  # fmt: skip
    init, step = parts(cfg)
    state = init(jax.random.key(0))
    poisoned = jax.tree.map(lambda x: x, state.params)
    poisoned["embedding_VD"][...] = jnp.full_like(poisoned["embedding_VD"][...], jnp.nan)
    state = dataclasses.replace(state, params=poisoned)
    after, metrics = step(state, batch())
    assert metrics["skipped_updates"] == 1
    assert after.step == 1
    for a, b in zip(moving(state), moving(after), strict=True):
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Noisy(TopK):
    """Top-k of logits with noise, in training alone."""

    reads = frozenset({"noise"})

    def __call__(self, params, given):
        """Routes T tokens."""
        if given.key_T is not None:
            shape = given.logits_TE.shape[1:]
            noise_TE = given.draws(lambda key: jax.random.normal(key, shape))
            given = dataclasses.replace(given, logits_TE=given.logits_TE + 3 * noise_TE)
        return super().__call__(params, given)


def test_noise_is_the_same_however_the_batch_is_cut_and_new_in_every_step():
    with ROUTERS.temporarily("noisy", Noisy):
        moe = {"router": "noisy", "noisy": {"k": 1}}
        mesh = config.Mesh(data=2, expert=2, model=2)
        # With parameters that stay as they are, another choice in the next step is one of noise.
        frozen = config.Optimizer(learning_rate=1e-30)
        whole, cut, spread = (
            np.asarray(steps(dataclasses.replace(cfg, optimizer=frozen), 1)[1]["load_NE"])
            for cfg in (settings(moe), settings(moe, microbatches=2), settings(moe, mesh=mesh))
        )
        np.testing.assert_array_equal(whole, cut)
        np.testing.assert_array_equal(whole, spread)
        _, (first, second) = history(dataclasses.replace(settings(moe), optimizer=frozen), 2)
        assert not np.array_equal(first["load_NE"], second["load_NE"])
        assert not np.array_equal(first["load_NE"][0], first["load_NE"][1])  # nor of two layers


def test_only_trainable_parameters_move_and_have_moments():
    cfg = settings({}, trainable=r"router_DE")
    (before, after), _ = history(cfg, 1)
    pairs = zip(before.params.flat_state(), after.params.flat_state(), strict=True)
    moved = {".".join(map(str, path)): not np.array_equal(a[...], b[...])
             for (path, a), (_, b) in pairs}  # fmt: skip
    assert {name for name, change in moved.items() if change} == {
        name for name in moved if "router_DE" in name
    }
    moments = sum(x.size for x in jax.tree.leaves(after.optimizer) if x.ndim)
    trained = sum(v[...].size for p, v in after.params.flat_state() if p[-1] == "router_DE")
    assert moments == 2 * trained


def test_a_pattern_that_finds_nothing_is_refused():
    init, _ = parts(settings({}, trainable="nothing_like_this"))
    with pytest.raises(config.ConfigError, match=r"config\.train\.trainable='nothing_like_this'"):
        jax.eval_shape(init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Forgetful(TopK):
    """Top-k without a state, whose router begins anew after every update."""

    def next_state(self, params_N, state_N, seen_N):
        """Zeros."""
        return state_N, {"router_DE": jnp.zeros_like(params_N["router_DE"])}


def test_a_router_without_a_state_may_revise_its_parameters():
    with ROUTERS.temporarily("forgetful", Forgetful):
        state, _ = steps(settings({"router": "forgetful"}), 1)
    flat = {path[-1]: leaf[...] for path, leaf in state.params.flat_state()}
    np.testing.assert_array_equal(flat["router_DE"], 0)
    moments = [x for p, x in jax.tree.leaves_with_path(state.optimizer) if "router_DE" in str(p)]
    assert moments
    assert all(not np.any(moment) for moment in moments)


@dataclasses.dataclass(frozen=True)
class Partly(TopK):
    """Top-k whose router begins anew for the first expert alone after every update."""

    def next_state(self, params_N, state_N, seen_N):
        """Zeros for one expert."""
        return state_N, {"router_DE": params_N["router_DE"].at[..., 0].set(0)}


def test_numbers_that_a_router_leaves_alone_keep_their_moments():
    with ROUTERS.temporarily("partly", Partly):
        state, _ = steps(settings({"router": "partly"}), 1)
    moments = [x for p, x in jax.tree.leaves_with_path(state.optimizer) if "router_DE" in str(p)]
    assert moments
    for moment in moments:
        assert not np.any(moment[..., 0])
        assert np.all(moment[..., 1:])


def test_a_dense_model_takes_no_notice_of_weights_of_routing_losses():
    loss = config.Loss(balance={"weight": 0.01, "controller": "linear"})
    _, metrics = steps(settings({"every_n_layers": 0}, loss=loss), 1)
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] == metrics["lm_loss"]


def test_layers_of_unlike_routers_have_their_own_losses():
    cfg = settings({}, loss=config.Loss(balance={"weight": config.AUTO}))
    model = dataclasses.replace(cfg.model, layers="0:moe.router=relu")
    cfg = dataclasses.replace(cfg, model=model)
    _, metrics = steps(cfg, 1)
    # Of two layers each loss is that of one, and the mean counts the other as 0.
    parts = 1e-8 * metrics["l1_loss"] + 1e-2 * metrics["balance_loss"]
    parts += 1e-4 * metrics["entropy_loss"] + metrics["lm_loss"]
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)


def test_metrics_show_the_states_of_the_step_by_layer():
    (_, before, _), (_, metrics) = history(settings(CASES["budget"]))
    layer = nnx.merge(nnx.graphdef(decoder_shapes(settings(CASES["budget"]).model)), before.params)
    used_N = layer.moe_feed_forwards[0].threshold[...]
    np.testing.assert_array_equal(metrics["router_threshold_N"], used_N)
    assert used_N.shape == (2,)
    assert np.all(used_N != 0.4)


def test_a_router_without_the_number_shows_nothing_in_its_layer():
    cfg = settings(CASES["budget"])
    layers = "1:moe.router=top_k"
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, layers=layers))
    decoder = decoder_shapes(cfg.model)
    init, _ = parts(cfg)
    shown = shown_states(nnx.graphdef(decoder), init(jax.random.key(0)).params)
    np.testing.assert_allclose(shown["threshold"], [0.4, np.nan])
