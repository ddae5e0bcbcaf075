"""Configs of top-p: what they set, by the settings that come out."""

import importlib

import pytest

from dynmoe_jax import config


@pytest.mark.parametrize("name", ["top_p", "top_p_budget", "dtop_p"])
def test_a_config_is_the_router_that_it_says(name):
    module = importlib.import_module(f"configs.routers.{name}")
    cfg = config.from_config_dict(module.get_config())
    router = cfg.model.moe.route
    assert cfg.model.moe.router == "top_p"
    published = name == "dtop_p"
    assert router.normalize_logits == router.renormalize == published
    assert router.experts_per_token == (0.0 if name == "top_p" else 1.8)
    assert (router.budget_rule == "proportional_integral") == published
    assert router.bounds(8).slots == (4 if name == "top_p" else 6)
    if published:
        assert (cfg.loss.balance.weight, cfg.loss.entropy.weight) == (1e-4, 1e-3)
        assert cfg.loss.router_z.weight in (0.0, config.AUTO)
        assert router.losses["router_z"] == 0.0
