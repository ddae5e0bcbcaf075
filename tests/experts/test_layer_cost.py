"""Costs of expert compute, worked out by hand."""

import pytest

from dynmoe_jax.experts.layer_cost import expert_weight_bytes, layer_cost, layer_peak_bytes
from dynmoe_jax.hardware.chips import CHIPS, Chip


def test_forward_costs_three_products_and_the_weights_of_the_experts_used():
    # 10 rows, D = 4, F = 6: 3 products of 2 * 10 * 4 * 6 = 480 FLOPs; weights 3 * 24 numbers each.
    cost = layer_cost(rows=10, experts=2, width=4, hidden_width=6)
    assert cost.flops == 1440
    assert expert_weight_bytes(2, 4, 6) == 2 * 72 * 4
    assert cost.bytes == 2 * 72 * 2 + 2 * 10 * 4 * 2
    assert cost.intensity == pytest.approx(1440 / 448)


def test_backward_doubles_the_products_and_writes_gradients():
    cost = layer_cost(rows=10, experts=2, width=4, hidden_width=6, backward=True)
    assert cost.flops == 3 * 1440
    assert cost.bytes == 3 * 288 + 5 * 80


def test_roofline_takes_the_slower_of_computing_and_moving():
    cost = layer_cost(rows=10, experts=2, width=4, hidden_width=6)
    assert cost.roofline_s(Chip(flops_per_s=144.0, bytes_per_s=1e9)) == pytest.approx(10.0)
    assert cost.roofline_s(Chip(flops_per_s=1e9, bytes_per_s=44.8)) == pytest.approx(10.0)


def test_one_token_is_bound_by_memory_and_a_batch_by_compute():
    h100 = CHIPS["h100"]
    decode = layer_cost(rows=2, experts=2, width=1024, hidden_width=2816)
    batch = layer_cost(rows=65536, experts=16, width=1024, hidden_width=2816)
    assert decode.roofline_s(h100) == decode.bytes / h100.bytes_per_s
    assert batch.roofline_s(h100) == batch.flops / h100.flops_per_s


def test_peak_holds_weights_gradients_tokens_and_saved_rows():
    # E = 2, D = 4, F = 6: 144 numbers of weights; T = 5: 20 numbers of tokens.
    assert layer_peak_bytes(5, 0, 2, 4, 6) == 144 * 2 + 2 * 20 * 2
    wanted = 144 * 2 + 144 * 4 + 4 * 20 * 2 + 2 * 10 * 6 * 2
    assert layer_peak_bytes(5, 10, 2, 4, 6, backward=True) == wanted
