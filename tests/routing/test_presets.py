"""Every preset of a router: loads, names its command, and takes a step when it is made small."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from benchmarks.config_fuzz import compiled
from dynmoe_jax import config
from dynmoe_jax.model.decoder import decoder_shapes
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "routers"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
L, B, V = 32, 4, 64
SMALL = {
    "width": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_width": 8,
    "hidden_width": 24,
    "vocab_size": V,
    "max_seq_len": L,
    "init_std": 0.3,
    "kernels": "plain",
}
NARROW = {"hidden_width": 8, "shared_hidden_width": 8, "adjugate_width": 4}


def settings_of(name):
    return importlib.import_module(f"configs.routers.{name}").get_config()


def shrunk(settings):
    """The preset with the fewest layers that hold its pattern, at most 8 experts, narrow."""
    model, moe = settings.model, settings.model.moe
    for key, value in SMALL.items():
        setattr(model, key, value)
    period = moe.every_n_layers or 1
    model.num_layers = moe.dense_first_layers + max(period, 2 - 2 % period)
    moe.num_experts = min(moe.num_experts, 8)
    for key, value in NARROW.items():
        if getattr(moe, key):
            setattr(moe, key, value)
    settings.data.seq_len, settings.train.batch_size, settings.train.microbatches = L, B, 1
    settings.optimizer.warmup_steps = 0
    return config.from_config_dict(settings)


def draw_batch():
    """Random tokens in two documents a row, with padding behind them."""
    tokens, targets = np.random.default_rng(0).integers(0, V, (2, B, L)).astype(np.int32)
    place_L = np.arange(L)
    segment_L = np.where(place_L < 14, 1, np.where(place_L < L - 3, 2, 0)).astype(np.int32)
    position_L = np.where(place_L < 14, place_L, place_L - 14).astype(np.int32)
    rows = {"segment_ids": segment_L, "positions": position_L}
    return {"tokens": tokens, "targets": targets} | {
        name: np.broadcast_to(row_L, (B, L)) for name, row_L in rows.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_names_its_command(name):
    cfg = config.from_config_dict(settings_of(name))
    assert cfg.model.num_moe_layers
    about = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    commands = re.sub(r"\\\n\s*", "", about).splitlines()
    wanted = ["python", "train.py", f"--config=configs/routers/{name}.py"]
    assert any(shlex.split(line)[:3] == wanted for line in commands if "train.py" in line)
    assert re.search(r"arXiv \d{4}\.\d{5}|\(\d{4}\)", about), "names no paper"


STEPS = [
    pytest.param(name, marks=[pytest.mark.long] if place % 5 else [])
    for place, name in enumerate(NAMES)
]
"""Each costs a compilation, so four of five wait for ``--long``."""


@pytest.mark.parametrize("name", STEPS)
def test_it_takes_a_step_in_which_all_of_the_router_learns(name):
    cfg = shrunk(settings_of(name))
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    train_step = make_train_step(cfg, optimizer, schedule)

    def first_step(key, batch):
        return train_step(init_state(cfg, optimizer, key), batch)

    key, batch = jax.random.key(0), draw_batch()
    state, metrics = compiled(jax.jit(first_step).trace(key, batch))(key, batch)
    assert np.isfinite(metrics["loss"])
    assert int(metrics["skipped_updates"]) == 0
    assert np.all(np.sum(metrics["load_NE"], axis=-1) > 0)
    # Adam's first moment is the gradient, times a constant.
    moments = jax.tree.leaves_with_path(optax.tree_utils.tree_get(state.optimizer, "mu"))
    layers = decoder_shapes(cfg.model).moe_feed_forwards
    for router in {layer.router_names for layer in layers}:
        for parameter in router:
            mine = [
                leaf for path, leaf in moments if f"'{parameter}'" in jax.tree_util.keystr(path)
            ]
            assert mine, parameter
            assert all(np.any(np.asarray(leaf) != 0) for leaf in mine), parameter
