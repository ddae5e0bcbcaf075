"""The roofline of kernels against arithmetic by hand."""

import pytest

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.instruction import parse_instruction
from dynmoe_jax.planning.tpu.kernels import (
    attention_flops,
    attention_part,
    is_projection,
    kernel_cost,
    logits_part,
)

CHIP = Chip(1e12, 1e9, product_width=128)
KERNEL = 'custom_call_target="tpu_custom_call"'
BLOCKS = (
    r'frontend_attributes={"xprof_metadata":"{\"block_q\": 256, \"block_kv\": 512, '
    r"\"block_q_dq\": 256, \"block_kv_dq\": 256, \"block_q_dkv\": 512, \"block_kv_dkv\": 512, "
    r'\"use_fused_bwd_kernel\": FUSED}"}'
)


def made(text):
    return parse_instruction("p", f"{text} parameter(0)")


# Four experts, R = 512 in tiles of 128: four tiles, and one visit more for every further expert.
OPERANDS = [
    made("s32[5]{0}"),
    made("s32[7]{0}"),
    made("s32[7]{0}"),
    made("bf16[512,64]{1,0}"),
    made("bf16[4,64,32]{2,1,0}"),
]


def test_a_grouped_product_costs_the_rows_used():
    kernel = parse_instruction("gmm.1", f"bf16[512,32]{{1,0}} custom-call(%a), {KERNEL}")
    cost = kernel_cost(kernel, OPERANDS, 100, CHIP)
    assert cost.flops == 2 * 100 * 64 * 32
    # Three tiles are computed twice, and widths are filled up to 128: 2 x 4 times.
    assert cost.busy_flops == 2 * (100 + 3 * 128) * 64 * 32 * 8
    # Rows in and out, all weights, and the numbers that say which tiles.
    assert cost.bytes == pytest.approx(2 * 100 * (64 + 32) + 2 * 4 * 64 * 32 + 4 * (5 + 7 + 7))
    assert cost.seconds(CHIP) == cost.bytes / 1e9


def test_rows_beyond_the_static_bound_are_not_computed():
    kernel = parse_instruction("gmm.1", f"bf16[512,32]{{1,0}} custom-call(%a), {KERNEL}")
    cost = kernel_cost(kernel, OPERANDS, 9999, CHIP)
    assert cost.flops == 2 * 512 * 64 * 32
    assert cost.busy_flops == 8 * cost.flops


def test_a_weight_gradient_costs_the_rows_used():
    operands = [*OPERANDS[:3], made("bf16[512,128]{1,0}"), made("bf16[512,256]{1,0}")]
    text = f"bf16[4,128,256]{{2,1,0}} custom-call(%a), {KERNEL}"
    cost = kernel_cost(parse_instruction("tgmm.1", text), operands, 100, CHIP)
    assert cost.flops == 2 * 100 * 128 * 256
    assert cost.bytes == pytest.approx(2 * 100 * (128 + 256) + 2 * 4 * 128 * 256 + 4 * 19)


def test_swiglu_fused_with_its_products_costs_the_rows_used():
    x, gate_up, down = (
        "bf16[512,128]{1,0}",
        made("bf16[4,128,512]{2,1,0}"),
        "bf16[4,256,128]{2,1,0}",
    )
    operands = [*OPERANDS[:3], made(x), gate_up, gate_up, made("f32[512,1]{1,0}")]
    text = f"bf16[512,256]{{1,0}} custom-call(%a), {KERNEL}"
    cost = kernel_cost(parse_instruction("grouped_swiglu.1", text), operands, 100, CHIP)
    assert cost.flops == 2 * 2 * 100 * 128 * 256
    assert cost.busy_flops == 2 * 2 * (100 + 3 * 128) * 128 * 256
    assert cost.recomputed == 0
    # Rows in and out, their weights; gate and up once, though two operands show them.
    moved = 2 * 100 * (128 + 256) + 4 * 100 + 2 * 4 * 128 * 512 + 4 * 19
    assert cost.bytes == pytest.approx(moved)
    # Backward: gate, up and the gradient of what is hidden, of which two were computed before.
    operands = [*OPERANDS[:3], made(x), made(x), gate_up, gate_up, made(down), operands[-1]]
    text = "(bf16[512,256]{1,0}, bf16[512,512]{1,0}, f32[2,512,1]{2,1,0}) custom-call(%a), "
    kernel = parse_instruction("grouped_swiglu_gradient.1", text + KERNEL)
    cost = kernel_cost(kernel, operands, 100, CHIP)
    assert cost.flops == 2 * 3 * 100 * 128 * 256
    assert cost.recomputed == 2 * 2 * 100 * 128 * 256
    moved = 2 * 100 * (2 * 128 + 3 * 256) + 4 * 100 * (1 + 2) + 2 * 4 * 128 * 3 * 256 + 4 * 19
    assert cost.bytes == pytest.approx(moved)


# Blocks of 256 x 512 that a causal mask of 1024 positions leaves: 1 + 1 + 2 + 2; of 256 x 256: 10;
# of 512 x 512: 3.
@pytest.mark.parametrize(
    ("name", "fused", "products", "pairs"),
    [
        ("fwd", "false", 2, 6 * 256 * 512),
        ("dq", "false", 3, 10 * 256 * 256),
        ("dkv", "false", 4, 3 * 512 * 512),
        ("dkv", "true", 5, 3 * 512 * 512),
    ],
)
def test_attention_computes_the_blocks_under_the_diagonal(name, fused, products, pairs):
    text = f"bf16[2,8,1024,64]{{3,2,1,0}} custom-call(%a), {KERNEL}, {BLOCKS}"
    text = text.replace("FUSED", fused)
    kernel = parse_instruction(f"splash_mha_{name}_segmented.1", text)
    shapes = [(1, 4, 4), (1, 4, 4), (2, 8, 1024, 64), (2, 8, 1024, 64)]
    flops = 2.0 * products * 2 * 8 * pairs * 64
    assert attention_flops(kernel, shapes) == flops
    operands = [made(f"bf16[{','.join(map(str, shape))}]{{0}}") for shape in shapes]
    # A head of 64 leaves half of a unit of 128 idle.
    assert kernel_cost(kernel, operands, 0, CHIP).busy_flops == 2 * flops


def test_another_kernel_costs_what_it_says():
    cost = r'backend_config={"cost_estimate":{"flops":"70","transcendentals":"0",'
    text = f'f32[8]{{0}} custom-call(%a), {KERNEL}, {cost}"bytes_accessed":"90"}}}}'
    assert kernel_cost(parse_instruction("k", text), [], 0, CHIP).bytes == 90
    silent = parse_instruction("k", f"f32[8]{{0}} custom-call(%a), {KERNEL}")
    assert kernel_cost(silent, [made("f32[4]{0}")], 0, CHIP).bytes == 48


# Two heads of 64 in each of four blocks; of 2048 positions 10 tiles of 512 x 512 are computed.
# Contractions of 64 take as long as of 256.  Products that stream 64 rows, or 80 where 16 of ones
# add up the odds, take their own time where 48 rows hide latching, and that of 72 where 72 do.
@pytest.mark.parametrize(
    ("name", "products", "latch_rows", "busy"),
    [
        ("forward", 2, 72, 256 + 80),
        ("forward", 2, 144, 256 + 144),
        ("backward", 5, 48, 2 * 256 + 3 * 64),
        ("backward", 5, 72, 2 * 256 + 3 * 72),
    ],
)
def test_attention_of_heads_side_by_side(name, products, latch_rows, busy):
    chip = Chip(1e12, 1e9, product_width=256, latch_rows=latch_rows)
    flops = 2 * products * 8 * 10 * 512 * 512 * 64
    cost = rf'backend_config={{"cost_estimate":{{"flops":"{flops}","transcendentals":"0",'
    cost += r'"bytes_accessed":"90"}}'
    query, log_sum = "bf16[1,2048,512]{2,1,0}", "f32[1,4,2,2048]{3,2,1,0}"
    operands = [made("s32[1,1,2048]{2,1,0}"), made(query)]
    result = f"({query}, {log_sum})" if name == "forward" else f"({query})"
    if name == "backward":
        operands.append(made(log_sum))
    text = f"{result} custom-call(%a), {KERNEL}, {cost}"
    kernel = parse_instruction(f"jvp_flat_attention_{name}_.1", text)
    assert attention_part(kernel) == f"flat_attention_{name}"
    found = kernel_cost(kernel, operands, 0, chip)
    assert found.flops == flops
    assert found.busy_flops == 2 * 8 * 10 * 512 * 512 * busy
    # Read: segments, queries; of forward the log-sum-exps are written, of backward read.
    assert found.bytes == 4 * 2048 + 2 * 2 * 2048 * 512 + 4 * 4 * 2 * 2048


def test_projections_count_as_products():
    text = f"bf16[64,128]{{1,0}} custom-call(%a), {KERNEL}"
    assert is_projection(parse_instruction("jvp_projection_forward_.2", text))
    assert is_projection(parse_instruction("projection_backward.1", text))
    assert not is_projection(parse_instruction("norm_forward.1", text))
    assert not is_projection(parse_instruction("projection_forward.1", "bf16[64]{0} copy(%a)"))


@pytest.mark.parametrize(("part", "again"), [("sums", 0), ("gradients", 30)])
def test_the_gradients_of_logits_take_the_logits_again(part, again):
    cost = r'backend_config={"cost_estimate":{"flops":"60","transcendentals":"9",'
    text = f'f32[8]{{0}} custom-call(%a), {KERNEL}, {cost}"bytes_accessed":"90"}}}}'
    kernel = parse_instruction(f"jvp_logit_{part}_.1", text)
    assert logits_part(kernel) == part
    assert not logits_part(parse_instruction(f"logit_{part}.1", "f32[8]{0} copy(%a)"))
    found = kernel_cost(kernel, [], 0, CHIP)
    assert (found.flops, found.busy_flops, found.bytes) == (60, 60, 90)
    assert found.recomputed == again
