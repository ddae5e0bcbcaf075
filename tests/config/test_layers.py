"""`config.model.layers`: what it gives each layer, and the sentences that refuse it."""

import dataclasses

import pytest

from dynmoe_jax import config

BASE = config.Model(
    num_layers=6,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_width=4,
    hidden_width=24,
    vocab_size=32,
    max_seq_len=16,
    moe=config.MoE(num_experts=4, hidden_width=12),
)


def model(layers, **moe):
    settings = dataclasses.replace(BASE, layers=layers, moe=dataclasses.replace(BASE.moe, **moe))
    return config.Config(model=settings, data=config.Data(seq_len=16)).model


def of_layers(found, name):
    *groups, name = name.split(".")
    models = (layer.model.moe if groups else layer.model for layer in found.by_layer)
    return [getattr(each, name) for each in models]


def test_without_the_setting_all_layers_are_those_of_the_model():
    plain = model("", every_n_layers=2, layer_offset=1)
    assert {id(layer.model) for layer in plain.by_layer} == {id(plain)}
    assert plain.moe_layers == (1, 3, 5)
    assert model("", every_n_layers=0).moe_layers == ()


def test_ranges_lists_and_several_settings():
    found = model(" 0-1, 4 : moe.num_experts=8 , num_heads = 2 ; 5:moe.hidden_width=20 ;")
    assert of_layers(found, "moe.num_experts") == [8, 8, 4, 4, 8, 4]
    assert of_layers(found, "num_heads") == [2, 2, 4, 4, 2, 4]
    assert of_layers(found, "moe.hidden_width") == [12, 12, 12, 12, 12, 20]


def test_a_layer_says_whether_it_has_experts():
    found = model("0:feed_forward=dense,hidden_width=8;3:feed_forward=moe", every_n_layers=2)
    assert found.moe_layers == (2, 3, 4)
    assert of_layers(found, "hidden_width")[0] == 8
    assert model("5:feed_forward=moe", every_n_layers=0).moe_layers == (5,)


def test_layers_take_over_only_what_they_read():
    """So that dense layers within a range share a program with those outside of it."""
    found = model("0-2:moe.num_experts=8,hidden_width=20", every_n_layers=2)
    assert of_layers(found, "moe.num_experts") == [8, 4, 8, 4, 4, 4]
    assert of_layers(found, "hidden_width") == [24, 20, 24, 24, 24, 24]


def test_another_router_with_settings_of_its_own():
    found = model("1:moe.router=top_k,moe.top_k.k=3")
    assert [type(router).__name__ for router in found.routers] == ["TopP", "TopK"]
    assert found.by_layer[1].model.moe.route.k == 3


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("0-3", "is not written LAYERS:NAME=VALUE"),
        ("0:moe.num_experts", "is not written LAYERS:NAME=VALUE"),
        ("6:num_heads=2", "some from 0 to 5, rising (config.model.num_layers=6)"),
        ("3-1:num_heads=2", "names the layers '3-1'"),
        ("x:num_heads=2", "names the layers 'x'"),
        ("0:moe.num_expert=2", "does not exist; write moe.num_experts"),
        ("0:width=8", "names width, which all layers share; set config.model.width"),
        ("0:moe.num_experts=few", "moe.num_experts='few' must be of type int"),
        ("0:moe.num_experts=0", "moe.num_experts=0 must be at least 1"),
        ("0:moe.router=top", "moe.router='top' must be one of"),
        ("0:feed_forward=none", "write dense or moe"),
        ("0-2:num_heads=2;2:num_heads=4", "layer 2 both num_heads=2 and num_heads=4"),
        ("0:hidden_width=8", "sets hidden_width=8 in layers that have experts (0)"),
        ("0:feed_forward=dense,moe.num_experts=8", "in layers that are dense (0)"),
        ("1:moe.top_k.k=2", "add moe.router=top_k there"),
        ("2:num_kv_heads=3", "does not fit layer 2: config.model.num_kv_heads=3 must divide"),
        ("2:head_width=5", "does not fit layer 2: config.model.head_width=5 must be even"),
        ("2:moe.router=top_k,moe.top_k.k=5", "layer 2: config.model.moe.top_k.k=5 must be at most"),
        ("2:moe.shared_gate=true", "has no shared expert to weigh"),
    ],
)
def test_refusals(layers, words):
    with pytest.raises(config.ConfigError) as refused:
        model(layers)
    message = str(refused.value)
    assert words in message
    assert f"config.model.layers={layers!r}" in message
    assert message.endswith((".", "?"))
    assert ". " not in message.replace(layers, "")


def test_equal_values_may_overlap():
    assert model("0-2:num_heads=2;2:num_heads=2").by_layer[2].model.num_heads == 2
