"""A run that begins with the model of another one: what comes from there, and what is refused."""

import contextlib
import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.data import open_tokenizer, train_tokenizer
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.checkpoint import IMPORTED, Checkpoints
from dynmoe_jax.runs.load import opened_run
from dynmoe_jax.runs.saving.moments import GROUP, Moments
from dynmoe_jax.runs.saving.streamed import StreamedArray
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.training.initial_model import initial_state, with_initial_model
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule, moments_of
from dynmoe_jax.training.step import init_state
from dynmoe_jax.training.trainer import train

pytestmark = pytest.mark.slow


@pytest.fixture
def tuned(settings, change, workdir):
    """Settings that ask for another model, of steps that change next to nothing."""
    cfg = change(settings, train__init_from=str(workdir), train__steps=2)
    cfg = change(cfg, optimizer__learning_rate=1e-12, model__num_layers=3, model__dtype="float32")
    return change(cfg, checkpoint__every_steps=1, model__moe__top_p__threshold=0.9)


def test_parameters_settings_and_tokenizer_are_those_of_the_folder(
    tuned, settings, change, state, tokenizer, workdir, saved_state, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    assert train(change(tuned, train__steps=1), folder) == 0
    saved = saved_state(folder, 1)
    assert saved["['step']"] == 1
    found = [saved[name] for name in sorted(saved) if name.startswith("['params']")]
    leaves = jax.tree.leaves_with_path({"params": state.params})
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    assert len(found) == len(wanted)
    for one, two in zip(found, (wanted[name] for name in sorted(wanted)), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-9)
    assert open_tokenizer(folder / TRAINED).fingerprint == tokenizer.fingerprint
    # It goes on without the folder that it began with.
    shutil.rmtree(workdir)
    assert train(tuned, folder) == 0
    summary = read_summary(folder)
    assert (summary.step, summary.complete) == (2, True)
    assert with_initial_model(tuned, folder).model == change(settings, model__dtype="float32").model


def begun_with(cfg, optimizer):
    """Parameters of a new run by their paths."""
    return dict(initial_state(cfg, optimizer, shapes_of(cfg, optimizer)).params.flat_state())


def shapes_of(cfg, optimizer):
    shapes = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


def test_biases_come_along(settings, change, tokenizer, tmp_path):
    biased = change(settings, model__attention_bias=True)
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)  # noqa: E731
    params = jax.tree.map(draw, parameter_shapes(biased.model))
    parent = tmp_path / "biased"
    parent.mkdir()
    tokenizer.save(parent / TRAINED)
    with contextlib.closing(Checkpoints(parent, config.Checkpoint())) as checkpoints:
        checkpoints.save(0, {"params": params}, {"tokenizer": tokenizer.fingerprint}, biased)
    cfg = change(settings, train__init_from=str(parent))
    cfg = with_initial_model(cfg, tmp_path / "new")
    found, wanted = begun_with(cfg, optax.sgd(0.1)), dict(params.flat_state())
    assert found.keys() == wanted.keys()
    assert {path[-1] for path in found} >= {"query_bias_HW", "key_bias_GW", "value_bias_GW"}
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))


def test_what_cannot_be_begun_with_is_refused(tuned, change, workdir, tmp_path):
    new = tmp_path / "new"
    with pytest.raises(config.ConfigError, match=r"init_from=.*nowhere' holds no run"):
        train(change(tuned, train__init_from=str(tmp_path / "nowhere")), new)
    other = tmp_path / "other.model"
    train_tokenizer(["another text of other words\n" * 40], 280, other)
    with pytest.raises(config.ConfigError, match="is not the tokenizer of the model"):
        train(change(tuned, data__tokenizer=str(other)), new)
    (workdir / TRAINED).unlink()
    with pytest.raises(config.ConfigError, match="holds no tokenizer"):
        train(tuned, new)
    assert not new.exists()


def test_a_longer_sequence_is_allowed(tuned, change, tmp_path):
    longer = change(tuned, model__max_seq_len=64, data__seq_len=64)
    assert with_initial_model(longer, tmp_path / "new").model.max_seq_len == 64
    shorter = change(tuned, data__seq_len=16, model__max_seq_len=16)
    assert with_initial_model(shorter, tmp_path / "new").model.max_seq_len == 32
    # What counts is the room that the folder's model has, not what a model of one's own would have.
    own = change(tuned, data__seq_len=32, model__max_seq_len=16)
    assert with_initial_model(own, tmp_path / "new").data.seq_len == 32
    with pytest.raises(config.ConfigError, match=r"seq_len=64 must be at most .*max_seq_len=32"):
        with_initial_model(change(tuned, data__seq_len=64), tmp_path / "new")


def test_adapters_begin_beside_a_dense_model(tuned, change, state, tmp_path):
    cfg = change(tuned, model__linear="lora", model__lora__rank=2)
    cfg = with_initial_model(cfg, tmp_path / "new")
    assert (cfg.model.linear, cfg.model.lora.rank) == ("lora", 2)
    assert cfg.model.moe.top_p.threshold == 0.4
    begun = begun_with(cfg, optax.sgd(0.1))
    for path, leaf in state.params.flat_state():
        np.testing.assert_array_equal(begun.pop(path)[...], leaf[...], err_msg=str(path))
    names = {path[-1] for path, leaf in begun.items() if np.any(leaf[...])}
    assert names == {"query_lora_DR", "value_lora_DR"}
    assert len(begun) == 4


@pytest.fixture
def made(settings, state, tokenizer, tmp_path):
    """(folder of a model that was made with moments after 7 updates, these): of all parameters
    but one, and of one that has another shape there."""
    random = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32)  # noqa: E731
    first, second = (jax.tree.map(draw, state.params) for _ in range(2))
    moments = {
        path: (leaf[...], 1e-4 * other[...] ** 2)
        for (path, leaf), (_, other) in zip(first.flat_state(), second.flat_state(), strict=True)
    }
    del moments["norm", "scale"]
    moments["head_DV",] = tuple(x[:, :-1] for x in moments["head_DV",])
    like = dict(state.params.flat_state())
    trees = (
        nnx.from_flat_state([(path, like[path].replace(both[i])) for path, both in moments.items()])
        for i in range(2)
    )
    folder = tmp_path / "made"
    folder.mkdir()
    tokenizer.save(folder / TRAINED)
    group = Moments(*trees, np.asarray(7, np.int32))._asdict()
    position = {"tokenizer": tokenizer.fingerprint, IMPORTED: "surgery"}
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        checkpoints.save(0, {"params": state.params, GROUP: group}, position, settings)
    del moments["head_DV",]
    return folder, moments


def optimizer_of(cfg):
    return make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))


@pytest.fixture
def begun(settings, change, made):
    """(settings, optimizer, shapes of the state, the state that begins with what was made)."""
    cfg = change(settings, train__init_from=str(made[0]), optimizer__clip_norm=1e6)
    optimizer = optimizer_of(cfg)
    shapes = shapes_of(cfg, optimizer)
    return cfg, optimizer, shapes, initial_state(cfg, optimizer, shapes)


def drawn(params, seed):
    """Gradients."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)


def test_the_first_update_is_that_of_the_moments_that_came_along(settings, made, begun):
    _, moments = made
    _, optimizer, _, state = begun
    gradients = drawn(state.params, 3)
    updates, _ = jax.jit(optimizer.update)(gradients, state.optimizer, state.params)
    b1, b2 = settings.optimizer.b1, settings.optimizer.b2
    rate = settings.optimizer.learning_rate / (settings.optimizer.warmup_steps + 1)
    params, gradient = dict(state.params.flat_state()), dict(gradients.flat_state())
    for path, update in updates.flat_state():
        zero = np.zeros(update.shape)
        first, second = (np.asarray(x, np.float64) for x in moments.get(path, (zero, zero)))
        g = np.asarray(gradient[path][...], np.float64)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        step = first / (1 - b1**8) / (np.sqrt(second / (1 - b2**8)) + settings.optimizer.epsilon)
        if path[-1] != "scale":
            step += settings.optimizer.weight_decay * np.asarray(params[path][...])
        np.testing.assert_allclose(update[...], -rate * step, rtol=1e-4, err_msg=str(path))


def test_frozen_parameters_have_no_moments(settings, change, made, capsys):
    folder, moments = made
    cfg = change(settings, train__init_from=str(folder), train__trainable="router|norm")
    optimizer = optimizer_of(cfg)
    found = moments_of(initial_state(cfg, optimizer, shapes_of(cfg, optimizer)).optimizer)
    assert int(found.count) == 7
    said = "step 0, with the moments of 3 of 4 trainable parameters after 7 updates."
    assert said in capsys.readouterr().out
    names = {path[-1] for path, _ in found.first.flat_state()}
    assert names == {"router_DE", "scale"}
    for i, tree in enumerate((found.first, found.second)):
        for path, leaf in tree.flat_state():
            wanted = moments[path][i] if path in moments else 0
            np.testing.assert_array_equal(leaf[...], wanted, err_msg=str(path))


def test_moments_go_on_over_a_checkpoint(begun, change, tokenizer, saved_state, tmp_path, capsys):
    cfg, optimizer, shapes, state = begun

    @jax.jit
    def step(state, gradients):
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, optimizer=moments)

    first, second = (drawn(state.params, seed) for seed in (4, 5))
    state, folder = step(state, first), tmp_path / "run"
    folder.mkdir()
    tokenizer.save(folder / TRAINED)
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        checkpoints.save(1, state, {"tokenizer": tokenizer.fingerprint}, cfg)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, shapes)
    after, again = step(state, second), step(restored, second)
    jax.tree.map(np.testing.assert_array_equal, after, again)

    saved = saved_state(folder, 1)
    with opened_run(folder) as run:
        assert (run.has_moments, run.updates) == (True, 8)
        for path, _ in state.params.flat_state():
            for group, stored in (("first", "mu"), ("second", "nu")):
                name = "".join(f"['{part}']" for part in (stored, *path))
                [wanted] = [leaf for key, leaf in saved.items() if name in key]
                np.testing.assert_array_equal(run.read(path, group=group), wanted)
                np.testing.assert_array_equal(run.read(path, (0,), group), wanted[0])
    # A stage that begins with the model of a training begins with moments of its own.
    capsys.readouterr()
    later = initial_state(change(cfg, train__init_from=str(folder)), optimizer, shapes)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(later.optimizer))
    assert "step 1." in capsys.readouterr().out.replace("\n", " ")


def test_a_model_in_bfloat16_is_begun_with_in_float32(settings, change, state, tokenizer, tmp_path):
    def stored(leaf):
        values = np.asarray(leaf)
        return StreamedArray(leaf.shape, values.__getitem__, dtype="bfloat16")

    folder = tmp_path / "made"
    folder.mkdir()
    tokenizer.save(folder / TRAINED)
    trees = [jax.tree.map(stored, state.params) for _ in range(3)]
    moments = Moments(*trees[1:], np.int32(2))._asdict()
    position = {"tokenizer": tokenizer.fingerprint, IMPORTED: "surgery"}
    with contextlib.closing(Checkpoints(folder, config.Checkpoint())) as checkpoints:
        checkpoints.save(0, {"params": trees[0], GROUP: moments}, position, settings)
    cfg = change(settings, train__init_from=str(folder))
    optimizer = optimizer_of(cfg)
    begun = initial_state(cfg, optimizer, shapes_of(cfg, optimizer))
    first, second, _ = moments_of(begun.optimizer)
    for tree in (begun.params, first, second):
        found = dict(tree.flat_state())
        for path, leaf in state.params.flat_state():
            wanted = np.asarray(leaf[...].astype(jnp.bfloat16), np.float32)
            assert found[path].dtype == jnp.float32
            np.testing.assert_array_equal(found[path][...], wanted, err_msg=str(path))
