"""Costs of operations of a step for GPU, by hand, on a few lines of HLO."""

import pytest

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.gpu.roofline import GpuRoofline
from dynmoe_jax.planning.hlo.module import Module

CHIP = Chip(flops_per_s=1e6, bytes_per_s=1e3)
DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def kernel(name, transform="jit"):
    target = 'custom_call_target="__gpu$xla.gpu.triton"'
    return f'{target}, metadata={{op_name="{transform}(f)/{name}/pallas_call"}}'


HLO = f"""HloModule step, is_scheduled=true

%sliced (stack: f32[8,100], i: s32[]) -> f32[1,100] {{
  %stack = f32[8,100]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[1,100]{{1,0}} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={{1,100}}
}}

%updated (into: f32[8,100], row: f32[1,100], j: s32[]) -> f32[8,100] {{
  %into = f32[8,100]{{1,0}} parameter(0)
  %row = f32[1,100]{{1,0}} parameter(1)
  %j = s32[] parameter(2)
  ROOT %update = f32[8,100]{{1,0}} dynamic-update-slice(%into, %row, %j, %j)
}}

%multiplied (left: bf16[16,8], right: bf16[8,4]) -> bf16[16,4] {{
  %left = bf16[16,8]{{1,0}} parameter(0)
  %right = bf16[8,4]{{1,0}} parameter(1)
  ROOT %dot = bf16[16,4]{{1,0}} dot(%left, %right), {DOT}
}}

ENTRY %main (s: f32[8,100], n: s32[]) -> f32[8,100] {{
  %s = f32[8,100]{{1,0}} parameter(0)
  %n = s32[] parameter(1)
  %a = bf16[16,8]{{1,0}} parameter(2)
  %b = bf16[8,4]{{1,0}} parameter(3)
  %x = bf16[64,128]{{1,0}} parameter(4)
  %w = bf16[2,128,256]{{2,1,0}} parameter(5)
  %q = bf16[2,128,4,32]{{3,2,1,0}} parameter(6)
  %cut = f32[1,100]{{1,0}} fusion(%s, %n), kind=kLoop, calls=%sliced
  %gemm = bf16[16,4]{{1,0}} fusion(%a, %b), kind=kCustom, calls=%multiplied
  %rows = bf16[64,256]{{1,0}} custom-call(%n, %x, %w), {kernel("grouped_product")}
  %again = bf16[64,256]{{1,0}} custom-call(%n, %x, %w), {kernel("grouped_product", "transpose")}
  %keys = bf16[2,128,4,32]{{3,2,1,0}} custom-call(%n, %q), {kernel("attention_to_keys")}
  %all = f32[8,100]{{1,0}} all-reduce(%s)
  %begun = ((f32[8,100]{{1,0}}, f32[1,100]{{1,0}}, s32[]), f32[8,100]{{1,0}}, u32[]) \
fusion-start(%s, %cut, %n), kind=kLoop, calls=%updated
  %ended = f32[8,100]{{1,0}} fusion-done(%begun)
  ROOT %end = f32[8,100]{{1,0}} fusion(%s, %cut, %n), kind=kLoop, calls=%updated
}}
"""


@pytest.fixture(scope="module")
def roofline():
    # Half of the 64 rows are used.
    return GpuRoofline(Module(HLO), CHIP, rows=32)


def seconds(roofline, name):
    (found,) = [o.seconds for o in roofline.operations if o.name == name]
    return found


def test_a_slice_counts_what_it_reads_and_writes(roofline):
    # A row of 400 bytes in and out, and a number of 4; out of and into a stack of 3,200.
    assert seconds(roofline, "cut") == pytest.approx(0.804)
    assert seconds(roofline, "end") == pytest.approx(0.804)


def test_what_others_compute_beside_counts_once(roofline):
    assert seconds(roofline, "begun") == pytest.approx(0.804)
    assert not any(o.name == "ended" for o in roofline.operations)


def test_a_product_takes_its_bytes_or_its_flops(roofline):
    # 2 x 16 x 8 x 4 FLOPs take 1 ms; 256 + 64 + 128 bytes 448.
    assert seconds(roofline, "gemm") == pytest.approx(0.448)
    # 2 x 32 x 128 x 256 FLOPs of the rows used: 2.1 s; weights of 131 kB take 131 s, half of the
    # rows 8 + 16 kB.
    assert seconds(roofline, "rows") == pytest.approx((131072 + (16384 + 32768 + 4) / 2) / 1e3)


def test_what_backward_computes_again_stands_apart(roofline):
    product, pairs = 2 * 32 * 128 * 256, 2 * 2 * 4 * (128 * 128 / 2) * 32
    assert roofline.flops == 2 * 16 * 8 * 4 + product + 3 * pairs
    assert roofline.recomputed == product + pairs


def test_collectives_are_not_operations(roofline):
    assert not any(o.name == "all" for o in roofline.operations)
