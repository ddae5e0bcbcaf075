"""A run that begins with the model of another one: what comes from there, and what is refused."""

import contextlib
import shutil
from functools import partial

import jax
import numpy as np
import optax
import pytest

from dynmoe_jax import config
from dynmoe_jax.data import open_tokenizer, train_tokenizer
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.training.initial_model import initial_state, with_initial_model
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
    shapes = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return dict(initial_state(cfg, optimizer, shapes).params.flat_state())


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
