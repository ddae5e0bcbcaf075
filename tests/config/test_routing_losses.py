"""Routing losses that settings ask for, their coefficients by layer, and what is refused."""

import dataclasses

import pytest

from dynmoe_jax import config
from dynmoe_jax.registry import all_kinds
from dynmoe_jax.routing.losses import coefficients, moves


def settings(loss=None, layers="", **moe):
    model = config.Model(num_layers=2, moe=config.MoE(**moe), layers=layers)
    return dataclasses.replace(config.Config(), model=model, loss=config.Loss(**loss or {}))


def weights(cfg):
    return coefficients(all_kinds(cfg.loss), [moe.route for moe in cfg.model.moe_settings])


def refusal(**changes):
    with pytest.raises(config.ConfigError) as caught:
        settings(**changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_layer_has_the_coefficients_that_its_own_router_declares():
    found = weights(settings(layers="0:moe.router=relu"))
    assert found["balance"] == (0.0, 1e-2)
    assert found["entropy"] == (0.0, 1e-4)
    assert found["l1"] == (1e-8, 0.0)


def test_a_dense_model_has_no_routing_losses():
    assert weights(settings({"balance": {"weight": 0.1}}, every_n_layers=0)) == {}


def test_a_coefficient_that_begins_at_zero_and_moves_counts_as_weighed():
    linear = {"weight": 0.0, "controller": "linear", "linear": {"final": 0.01}}
    cfg = settings({"balance": linear})
    assert moves(cfg.loss.balance, weights(cfg)["balance"])
    assert not moves(cfg.loss.router_z, weights(cfg)["router_z"])


def test_entropy_of_scores_that_are_no_softmax_is_refused():
    message = refusal(loss={"entropy": {"weight": 0.1}}, router="sigmoid_bias")
    assert message.startswith("config.loss.entropy.weight=0.1 needs softmax")


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"loss": {"l1": {"sparsity": {"factor": 1.5}}}}, "config.loss.l1.sparsity.factor=1.5"),
        ({"loss": {"balance": {"counts": "per_choice"}}, "router": "relu"},
         "config.loss.balance.counts="),
        ({"layers": "0:moe.num_experts=8", "top_k": {"renormalize": True}},
         "config.model.moe.top_k.renormalize=True"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(changes, setting):
    assert refusal(**changes).startswith(setting)


def test_a_setting_of_a_kind_that_one_layer_chooses_is_accepted():
    cfg = settings(layers="0:moe.router=top_k", top_k={"renormalize": True})
    assert cfg.model.moe_settings[0].route.renormalize


def test_only_layers_that_there_are_have_to_fit():
    moe = {"router": "top_k", "top_k": {"k": 6}, "num_experts": 4}
    assert settings(layers="0-1:moe.num_experts=8", **moe).model.moe_settings[0].num_experts == 8
    assert "k=6 must be at most" in refusal(layers="0:moe.num_experts=8", **moe)
