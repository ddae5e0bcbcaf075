"""Every preset of a router as a whole run: trained, stopped, continued, reported, written with.

Each costs about ten compilations, so that they wait for ``--long``; runs of routers with states, of
those that look ahead, and of those that draw noise are tested without.
"""

import dataclasses
import zlib

import jax
import numpy as np
import pytest

from dynmoe_jax import config
from dynmoe_jax.command_line import EXIT_INTERRUPTED
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.inference.writer import Writer
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh, state_shardings
from dynmoe_jax.registry import chosen, with_choice
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step
from dynmoe_jax.training.trainer import train
from tests.small_presets import NAMES, SEQ_LEN, VOCABULARY, shrunk
from tests.small_run import interrupt_at

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 5


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_a_preset_stops_goes_on_bit_for_bit_and_is_complete(
    name, settings, saved_state, tmp_path
):
    small = shrunk(name)
    cfg = dataclasses.replace(
        settings,
        model=small.model,
        loss=small.loss,
        train=config.Train(steps=STEPS, batch_size=8, log_every_steps=1),
    )
    # A step of its own for each preset, that is the same in each run of the tests.
    stop = 1 + zlib.crc32(name.encode()) % (STEPS - 1)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, stop)
        assert train(cfg, tmp_path / "stopped") == EXIT_INTERRUPTED
    assert train(cfg, tmp_path / "stopped") == 0
    assert train(cfg, tmp_path / "whole") == 0
    stopped, whole = (saved_state(tmp_path / run, STEPS) for run in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(stopped[path], array, err_msg=path)
    summary, lines = read_summary(tmp_path / "stopped"), read_metrics(tmp_path / "stopped")
    assert summary.complete
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "stopped" / "report.html").exists()
    loaded, decoder, tokenizer = load_run(tmp_path / "stopped")
    if loaded.model.looks_ahead:
        assert summary.sample is None
        assert loaded.model.looks_ahead in summary.left_out.values()
        return
    writer = Writer(decoder, tokenizer, Sampling(max_tokens=4, temperature=0.0))
    [[written]] = writer.write(["the a token"])
    assert written.ids.size == 4
    assert np.isfinite(summary.heldout.loss)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_eight_devices_is_that_on_one(name):
    cfg = dataclasses.replace(shrunk(name), mesh=config.Mesh(data=2, expert=2, model=2))
    transforms = chosen(cfg.model.moe, "transforms")
    if any(transform.group == "device" for transform in transforms):
        # What each device drops among its own tokens depends on the mesh, as it says.
        moe = with_choice(cfg.model.moe, "transforms", [])
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    train_step = make_train_step(cfg, optimizer, schedule)
    init = lambda key: init_state(cfg, optimizer, key)  # noqa: E731
    batch = draw_batch(cfg.train.batch_size)

    def two_steps(state, batch):
        state, first = train_step(state, batch)
        return *train_step(state, batch), first

    alone = jax.jit(two_steps)(jax.jit(init)(jax.random.key(0)), batch)
    mesh = make_mesh(cfg.mesh, cfg.train.batch_size)
    with jax.set_mesh(mesh):
        placed = state_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
        state = jax.jit(init, out_shardings=placed)(jax.random.key(0))
        together = jax.jit(two_steps)(state, jax.device_put(batch, batch_sharding(mesh)))
    for metrics in (1, 2):
        for key in ("loss", "grad_norm"):
            expected = float(alone[metrics][key])
            assert float(together[metrics][key]) == pytest.approx(expected, rel=1e-4), key
    np.testing.assert_array_equal(together[2]["load_NE"], alone[2]["load_NE"])
    # Router states, and the gradients as Adam's first moment keeps them.
    states = jax.tree.leaves_with_path((alone[0].params, alone[0].optimizer))
    for (path, expected), found in zip(
        states, jax.tree.leaves((together[0].params, together[0].optimizer)), strict=True
    ):
        where = jax.tree_util.keystr(path)
        if "mu" in where:
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=where)


def draw_batch(size):
    """Random tokens in two documents a row, with padding behind them."""
    shape = (2, size, SEQ_LEN)
    tokens, targets = np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)
    place_L = np.arange(SEQ_LEN)
    segment_L = np.where(place_L < 14, 1, np.where(place_L < SEQ_LEN - 3, 2, 0))
    rows = {"segment_ids": segment_L, "positions": np.where(place_L < 14, place_L, place_L - 14)}
    return {"tokens": tokens, "targets": targets} | {
        key: np.broadcast_to(row_L.astype(np.int32), (size, SEQ_LEN)) for key, row_L in rows.items()
    }
