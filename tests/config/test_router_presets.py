"""Presets of routers: each is accepted, and weighs only losses that its router can serve."""

import importlib
from pathlib import Path

import pytest

from dynmoe_jax import config
from dynmoe_jax.registry import all_kinds
from dynmoe_jax.routing.losses import coefficients

PRESETS = sorted(path.stem for path in Path("configs/routers").glob("*.py"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_accepted_and_weighs_what_its_router_gives(name):
    module = importlib.import_module(f"configs.routers.{name}")
    assert f"--config=configs/routers/{name}.py" in module.__doc__
    cfg = config.from_config_dict(module.get_config())
    router = cfg.model.moe.route
    bounds = router.bounds(cfg.model.moe.num_experts)
    assert bounds.fewest <= bounds.expected <= bounds.slots
    weighed = coefficients(all_kinds(cfg.loss), [router])
    for loss, (weight,) in weighed.items():
        assert not weight or all_kinds(cfg.loss)[loss].needs <= router.gives
