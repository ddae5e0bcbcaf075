"""Presets of routers: they load, and each has the loss and the capacity of its paper."""

import importlib

import pytest

from dynmoe_jax import config
from dynmoe_jax.registry import all_kinds, chosen
from dynmoe_jax.routing.losses import coefficients

PAPERS = {
    "switch": ({"balance": 1e-2}, "sum", 1.25),
    "gshard": ({"balance": 1e-2}, "first_choice_only", 1.25),
    "mixtral": ({"balance": 2e-2}, "sum", None),
    "deepseek_moe": ({"balance": 1e-2}, "per_choice", None),
    "qwen1_5_moe": ({"balance": 1e-3}, "sum", None),
    "openmoe": ({"balance": 1e-2, "router_z": 1e-4}, "sum", None),
    "moec": ({"balance": 1e-2, "cluster_variance": 1e-2}, "sum", 2.0),
    "st_moe": ({"balance": 1e-2, "router_z": 1e-3}, "sum", 1.25),
    "skywork": ({"deviation": 1e-2}, "sum", 1.25),
    "noisy_top_k": ({"importance": 0.1, "load": 0.1}, "sum", None),
}
"""Coefficients, the choices that balance counts, and the capacity factor."""


@pytest.mark.parametrize("name", PAPERS)
def test_loss_and_capacity_are_the_papers(name):
    settings = config.from_config_dict(
        importlib.import_module(f"configs.routers.{name}").get_config()
    )
    weights, counts, capacity = PAPERS[name]
    routers = [moe.route for moe in settings.model.moe_settings]
    found = coefficients(all_kinds(settings.loss), routers)
    assert {loss: w[0] for loss, w in found.items() if any(w)} == weights
    assert settings.loss.balance.counts == counts
    transforms = chosen(settings.model.moe, "transforms")
    assert [each.factor for each in transforms] == ([] if capacity is None else [capacity])
