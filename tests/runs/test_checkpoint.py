"""Checkpoints: what is kept, what may change between runs, and a trained run loaded for use."""

import dataclasses
import gc
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynmoe_jax import config
from dynmoe_jax.mesh.make_mesh import make_mesh, replicated
from dynmoe_jax.runs.begun import check_compatible, make_folder
from dynmoe_jax.runs.checkpoint import Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run


@pytest.fixture
def opened(workdir):
    checkpoints = Checkpoints(workdir, config.Checkpoint(keep=2))
    yield checkpoints
    checkpoints.close()


def assert_same(actual, wanted):
    jax.tree.map(np.testing.assert_array_equal, actual, wanted)


def test_looking_at_a_run_leaves_alone_what_it_is_writing(settings, workdir):
    unfinished = workdir / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    load_run(workdir)
    assert unfinished.exists()


def test_folder_that_cannot_be_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(config.ConfigError, match=r"cannot be written .*; name another folder"):
        make_folder(tmp_path / "file" / "run")


def test_only_the_newest_are_kept(opened, workdir):
    assert opened.latest_step() == 4
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"3", "4"}


def test_saves_leave_nothing_behind(opened, state, settings):
    """But what TensorStore never frees: four strings for each array, and Orbax's counters."""
    blocks = []
    gc.freeze()  # what earlier tests left is not looked through eight times
    for step in range(5, 13):
        opened.save(step, state, {"row": step}, settings)
        opened.wait()
        gc.collect()
        blocks.append(sys.getallocatedblocks())
    arrays = len(jax.tree.leaves(state))
    assert np.median(np.diff(blocks[2:])) < 4 * (arrays + 10) + 400


def test_state_position_and_settings_come_back_together(opened, state, settings):
    restored, position = opened.restore(4, state)
    assert_same(restored.params, state.params)
    assert_same(restored.optimizer, state.optimizer)
    assert (int(restored.step), position["row"]) == (4, 4)
    assert opened.position(4) == position
    assert opened.config(4) == settings
    older, position = opened.restore(3, state)
    assert_same(older.params, jax.tree.map(lambda x: x + 1, state.params))
    assert position["row"] == 3


def test_state_is_placed_as_asked(opened, state):
    everywhere = replicated(make_mesh(config.Mesh(), batch_size=8))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)  # noqa: E731
    restored, _ = opened.restore(4, jax.tree.map(place, state))
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {everywhere}


def test_arrays_that_the_model_does_not_ask_for_are_an_error_that_names_them(opened, state):
    asked = [leaf for leaf in state.params.flat_state() if leaf[0][-1] != "output_HWD"]
    asked = nnx.from_flat_state(asked)
    with pytest.raises(CheckpointError, match=r"holds \S*attention\.output_HWD, which the model"):
        opened.params(4, asked)
    with pytest.raises(CheckpointError, match="output_HWD"):
        opened.restore(4, dataclasses.replace(state, params=asked))


def test_saving_a_step_again_changes_nothing(opened, state, settings):
    opened.save(4, jax.tree.map(jnp.zeros_like, state), {"row": 0}, settings)
    restored, position = opened.restore(4, state)
    assert_same(restored.params, state.params)
    assert position["row"] == 4


def test_half_written_checkpoint_is_not_continued_from(workdir, state):
    (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(workdir, config.Checkpoint())
    assert checkpoints.latest_step() == 4
    checkpoints.close()


def test_every_setting_that_makes_another_model_or_stream_is_refused(settings, change, tmp_path):
    for name, value in (
        ("seed", 5),
        ("model__num_layers", 4),
        ("model__tie_embeddings", True),
        ("model__moe__top_p__renormalize", True),
        ("data__domain_weights", "text=1"),
        ("data__virtual_shards", 4),
        ("train__batch_size", 16),
    ):
        dotted = name.replace("__", ".")
        with pytest.raises(config.ConfigError, match=rf"config\.{dotted}={value!r} differs from"):
            check_compatible(settings, change(settings, **{name: value}), tmp_path)
    check_compatible(settings, change(settings, train__steps=50, mesh__data=8), tmp_path)


def test_a_budget_may_change_and_not_begin(settings, change, tmp_path):
    """A budget that begins in the middle would have no threshold in the checkpoint."""
    name = "model__moe__top_p__experts_per_token"
    held, other = (change(settings, **{name: budget}) for budget in (1.5, 2.5))
    check_compatible(held, other, tmp_path)
    refusal = r"config\.model\.moe\.top_p\.experts_per_token=1\.5 differs from 0\.0 of"
    with pytest.raises(config.ConfigError, match=refusal):
        check_compatible(settings, held, tmp_path)


def test_run_is_loaded_for_use(workdir, state, settings, tokenizer):
    cfg, decoder, loaded = load_run(str(workdir))
    assert cfg == settings
    assert loaded.fingerprint == tokenizer.fingerprint
    assert_same(nnx.state(decoder, nnx.Param), state.params)
    assert {leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(decoder)} == {True}
    tokens = jnp.asarray(loaded.encode("the router"))[None]
    assert decoder(tokens).logits.shape == (*tokens.shape, 300)


def test_loading_a_folder_without_a_run_is_one_sentence_and_writes_nothing(tmp_path):
    with pytest.raises(config.ConfigError, match="holds no run"):
        load_run(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(config.ConfigError, match="holds no checkpoint yet"):
        load_run(tmp_path)
