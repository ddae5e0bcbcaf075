"""Plans of models whose layers are not all alike, against the shapes of their parameters."""

import dataclasses
import functools
import itertools
import math

import pytest

from dynmoe_jax import config
from dynmoe_jax.hardware.chips import CHIPS
from dynmoe_jax.interop.architectures.moe_layers import grouping
from dynmoe_jax.model import parameter_shapes
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.planning.plan import analytic_flops
from dynmoe_jax.planning.planner import Request, plan_run

B, L, K = 8, 64, 2
LAYERS = [
    {"num_layers": 28, "dense_first_layers": 1},  # DeepSeekMoE 16B
    {"num_layers": 3},
    {"num_layers": 6, "every_n_layers": 2},
    {"num_layers": 6, "every_n_layers": 3, "layer_offset": 2},
    {"num_layers": 7, "every_n_layers": 2, "layer_offset": 1, "dense_first_layers": 3},
    {"num_layers": 2, "every_n_layers": 0},
    {"num_layers": 5, "dense_first_layers": 2, "activation": "relu", "experts": "gelu"},
]
SHARED = [{}, {"shared_hidden_width": 48, "shared_gate": True}]


OF_MODEL = ("num_layers", "activation")


def make(layers, shared):
    moe = {name: value for name, value in layers.items() if name not in OF_MODEL} | shared
    return config.Config(
        model=config.Model(
            **{name: value for name, value in layers.items() if name in OF_MODEL},
            width=32,
            num_heads=4,
            num_kv_heads=2,
            head_width=8,
            hidden_width=80,
            vocab_size=128,
            moe=config.MoE(num_experts=4, hidden_width=24, router="top_k", top_k={"k": K}, **moe),
        ),
        data=config.Data(seq_len=L),
        train=config.Train(batch_size=B),
    )


CASES = [make(layers, shared) for layers, shared in itertools.product(LAYERS, SHARED)]
"""A shared expert means nothing to a dense model, which may have the setting nevertheless."""


@pytest.fixture(params=CASES, ids=lambda cfg: f"{cfg.model.num_layers}, {cfg.model.moe}"[:90])
def cfg(request):
    return request.param


@functools.cache
def shapes_of(model):
    return parameter_shapes(model).flat_state()


def moe_layers_in(model):
    return sum(leaf.shape[0] for path, leaf in shapes_of(model) if path[-1] == "router_DE")


def multiplied_numbers(cfg):
    """Numbers of matrices that a token is multiplied with, in a model that uses K experts."""
    found = 0.0
    for path, leaf in shapes_of(cfg.model):
        name = path[-1]
        if len(leaf.shape) < 2 or "scale" in name or "bias" in name or "norm" in str(path):
            continue
        share = K / cfg.model.moe.num_experts if name.endswith(("_ED2F", "_EDF", "_EFD")) else 1.0
        found += share * math.prod(leaf.shape) * (name != "embedding_VD")
    return found


def test_layers_with_experts_are_those_that_have_a_router(cfg):
    assert cfg.model.num_moe_layers == moe_layers_in(cfg.model)
    layers = list(cfg.model.moe_layers)
    assert len(layers) == cfg.model.num_moe_layers
    moe = dataclasses.replace(cfg.model.moe, **grouping(layers, cfg.model.num_layers))
    again = dataclasses.replace(cfg.model, moe=moe)
    assert list(again.moe_layers) == layers


def test_analytic_flops_are_two_for_each_number_that_is_multiplied(cfg):
    model = cfg.model
    scores = model.num_layers * 2 * L * model.num_heads * model.head_width
    wanted = 3 * B * L * (2 * multiplied_numbers(cfg) + scores)
    assert analytic_flops(cfg, K, 1) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("layers", [LAYERS[0], LAYERS[4], LAYERS[5], LAYERS[6]])
def test_parts_of_a_gpu_plan_compute_what_the_model_does(layers, monkeypatch):
    """On a chip whose memory takes no time."""
    cfg = make(layers, SHARED[1])
    quick = dataclasses.replace(CHIPS["h100"], bytes_per_s=math.inf)
    monkeypatch.setitem(CHIPS, "h100", quick)
    plan = plan_run(Request(cfg, "h100:1", K))
    assert plan.time.compute * quick.flops_per_s == pytest.approx(plan.flops.analytic, rel=1e-9)
    assert plan.utilisation == pytest.approx(1.0)
    assert plan.memory.parameters == 4 * count_parameters(cfg.model)


def test_memory_of_a_gpu_plan_counts_each_layer_as_what_it_is():
    """Gate and up are kept for backward; and of a layer at work its own matrices."""

    def memory(layers, shared):
        return plan_run(Request(make(layers, shared), "h100:1", K)).memory

    moe, dense = memory({"num_layers": 4}, {}), memory({"num_layers": 4, "every_n_layers": 0}, {})
    mixed = memory({"num_layers": 4, "every_n_layers": 2}, {})
    assert mixed.activations == pytest.approx((moe.activations + dense.activations) / 2)
    first = memory({"num_layers": 4, "dense_first_layers": 1}, {})
    assert first.activations == pytest.approx((3 * moe.activations + dense.activations) / 4)
    narrow = memory({"num_layers": 4, "every_n_layers": 0, "activation": "relu"}, {})
    assert dense.activations - narrow.activations == 4 * 2 * B * L * 80  # it has no gate
    shared = memory({"num_layers": 4}, {"shared_hidden_width": 48})
    assert shared.activations - moe.activations == 4 * 2 * B * L * 2 * 48
    # A dense model has no experts to put together.
    many = dataclasses.replace(make({"num_layers": 4, "every_n_layers": 0}, {}).model.moe)
    cfg = make({"num_layers": 4, "every_n_layers": 0}, {})
    many = dataclasses.replace(cfg.model, moe=dataclasses.replace(many, num_experts=400))
    assert plan_run(Request(dataclasses.replace(cfg, model=many), "h100:1", K)).memory == dense


def test_several_devices_cut_the_shared_expert_and_the_dense_layers(monkeypatch):
    quick = dataclasses.replace(CHIPS["h100"], bytes_per_s=math.inf)
    monkeypatch.setitem(CHIPS, "h100", quick)
    cfg = make({"num_layers": 3, "dense_first_layers": 1}, {"shared_hidden_width": 48})

    def seconds(size):
        mesh = config.Mesh(data=1, model=size)
        plan = plan_run(Request(dataclasses.replace(cfg, mesh=mesh), f"h100:{size}", K))
        return {operation.module: operation.total for operation in plan.operations}

    whole, halves = seconds(1), seconds(2)
    for name in ("DenseFeedForward", "apply_experts", "MoEFeedForward.shared"):
        (part,) = (module for module in whole if module.endswith(name))
        assert halves[part] == pytest.approx(whole[part] / 2)
