"""Grown models on disk: what reads them, what refuses them, and what training does to masks."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.model.masks import Mask
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.training.initial_model import initial_state, with_initial_model
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule, moments_of
from dynmoe_jax.training.step import init_state, make_train_step
from tests.small_parent import drawn_state, main, operate, write_parent

pytestmark = pytest.mark.slow

STEPS = 3
SIZES = {"width": 24, "hidden_width": 40, "num_heads": 4, "num_layers": 4}


@pytest.fixture(scope="module")
def grown(branches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown") / "grown"
    record = operate(
        "grow", branches[0], to=folder, tokens=300, init_std=1.0, mask_steps=STEPS, **SIZES
    )
    assert record["exact"]["measured"] < record["exact"]["promised"] == 1e-5
    assert record["after"]["parameters"] > 2 * record["before"]["parameters"]
    return folder


def begun(cfg, folder, tmp_path):
    """(step, state) of a training that begins with a folder."""
    cfg = with_initial_model(cfg, tmp_path)
    optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
    shapes = jax.eval_shape(partial(init_state, cfg, optimizer), jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    state = initial_state(cfg, optimizer, jax.tree.map(place, shapes))
    return cfg, jax.jit(make_train_step(cfg, optimizer, optax.constant_schedule(1e-2))), state


def a_batch(cfg):
    random, L = np.random.default_rng(2), cfg.data.seq_len
    tokens_BL, targets_BL = random.integers(0, 300, (2, 2, L)).astype(np.int32)
    ones_BL, positions_BL = np.ones((2, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (2, 1))
    return dict(zip(BATCH_ARRAYS, (tokens_BL, targets_BL, ones_BL, positions_BL), strict=True))


def masks_of(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.filter_state(params, Mask))])


def test_the_first_update_of_what_was_there_is_that_without_growth(
    settings, change, branches, grown, tmp_path
):
    # Moments come along from results of surgery alone, so the small one is a result too.
    operate("average", branches[0], branches[0], to=tmp_path / "small", tokens=1)
    found = []
    for folder in (tmp_path / "small", grown):
        asked = change(settings, train__init_from=str(folder))
        cfg, step, state = begun(asked, folder, tmp_path / f"new_{len(found)}")
        before = jax.tree.map(np.asarray, state.params)
        after, metrics = step(state, a_batch(cfg))
        found.append((before, after, float(metrics["grad_norm"]), step, cfg))
    (before, after, norm, _, _), (wide, wider, same, step, cfg) = found
    assert same == pytest.approx(norm, rel=1e-5)
    cuts = {
        ("embedding_VD",): np.s_[:, :16],
        ("groups", "layers", 0, "attention", "query_DHW"): np.s_[::2, :16, :2],
        ("groups", "layers", 0, "feed_forward", "down_FD"): np.s_[::2, :24, :16],
    }  # each layer is followed by its copy
    small, smaller, large, larger = (
        dict(params.flat_state()) for params in (after.params, before, wider.params, wide)
    )
    for path, cut in cuts.items():
        wanted = np.asarray(small[path][...]) - smaller[path][...]
        update = np.asarray(large[path][...])[cut] - larger[path][...][cut]
        np.testing.assert_allclose(update, wanted, rtol=2e-3, atol=2e-6, err_msg=str(path))
    assert int(moments_of(wider.optimizer).count) == int(moments_of(after.optimizer).count)

    # Masks rise by a third with every update, to exactly 1.
    seen, state = [set(masks_of(wide))], wider
    for _ in range(STEPS):
        seen.append(set(masks_of(state.params)))
        state, _ = step(state, a_batch(cfg))
    third = np.float32(1) / np.float32(3)
    assert seen == [{0, 1}, {third, 1}, {np.float32(2) / np.float32(3), 1}, {1}]


def test_a_skipped_update_leaves_masks_as_they_are(settings, change, grown, tmp_path):
    asked = change(settings, train__init_from=str(grown))
    cfg, step, state = begun(asked, grown, tmp_path)
    bad = jax.tree.map(lambda x: x, state.params)
    bad["norm"]["scale"] = bad["norm"]["scale"].replace(bad["norm"]["scale"][...] * np.nan)
    after, metrics = step(dataclasses.replace(state, params=bad), a_batch(cfg))
    assert int(metrics["skipped_updates"]) == 1
    assert set(masks_of(after.params)) == {0, 1}


def test_a_grown_model_writes_what_its_parent_does(branches, grown):
    written = []
    for folder in (branches[0], grown):
        _, decoder, tokenizer = load_run(folder)
        prompt, greedy = tokenizer.encode("the token"), Sampling(temperature=0.0)
        written += Generator(decoder).write([prompt], [6], greedy, vocab_size=300, stop_ids=[])
    assert list(written[0].ids) == list(written[1].ids)


def test_what_would_lose_masks_refuses(grown, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="has grown and whose masks"):
        export_model(grown, tmp_path / "export")
    assert main("stack", f"--from={grown}", f"--to={tmp_path / 'stacked'}") == 2
    assert "its masks are below 1, which stack would lose" in " ".join(
        capsys.readouterr().out.split()
    )
    assert not list(tmp_path.iterdir())


def test_a_model_whose_masks_are_1_is_one_without(dense_settings, change, tokenizer, tmp_path):
    cfg = change(dense_settings, model__mask_steps=5)
    state = drawn_state(cfg)
    full = [
        (path, leaf.replace(np.ones_like(leaf[...])) if isinstance(leaf, Mask) else leaf)
        for path, leaf in state.params.flat_state()
    ]
    state = dataclasses.replace(state, params=nnx.from_flat_state(full))
    folder = write_parent(tmp_path / "whole", cfg, tokenizer, state)
    loaded, decoder, _ = load_run(folder)
    assert loaded.model.mask_steps == 0
    assert not jax.tree.leaves(nnx.state(decoder, Mask))
    export_model(folder, tmp_path / "export")
    operate("stack", folder, to=tmp_path / "stacked", times=2, tokens=1)
