"""Presets of routers (``configs/routers``), made so small that compiling is all they cost."""

import importlib
from pathlib import Path

from dynmoe_jax import config

FOLDER = Path(__file__).parents[1] / "configs" / "routers"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
SEQ_LEN = 32
VOCABULARY = 300
SMALL = {
    "width": 16,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_width": 8,
    "hidden_width": 24,
    "vocab_size": VOCABULARY,
    "max_seq_len": SEQ_LEN,
    "init_std": 0.3,
    "kernels": "plain",
}
NARROW = {"hidden_width": 8, "shared_hidden_width": 8, "adjugate_width": 4}


def settings_of(name: str):
    """The preset as it is, a ConfigDict."""
    return importlib.import_module(f"configs.routers.{name}").get_config()


def shrunk(name: str) -> config.Config:
    """The preset with the fewest layers that hold its pattern, at most 8 experts, narrow."""
    settings = settings_of(name)
    model, moe = settings.model, settings.model.moe
    for key, value in SMALL.items():
        setattr(model, key, value)
    period = moe.every_n_layers or 1
    model.num_layers = moe.dense_first_layers + max(period, 2 - 2 % period)
    moe.num_experts = min(moe.num_experts, 8)
    for key, value in NARROW.items():
        if getattr(moe, key):
            setattr(moe, key, value)
    settings.data.seq_len = SEQ_LEN
    settings.train.batch_size, settings.train.microbatches = 8, 1
    settings.optimizer.warmup_steps = 0
    return config.from_config_dict(settings)
