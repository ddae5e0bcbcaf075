"""The reader of HLO against modules whose products are counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from dynmoe_jax.planning.hlo.module import Module

TPU_KERNEL = 'custom_call_target="tpu_custom_call"'

LOOP = """HloModule loop, is_scheduled=true

%fused (p.0: f32[4,8], p.1: f32[8,16]) -> f32[4,16] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = f32[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %w = f32[8,16]{1,0} constant({...})
  %f = f32[4,16]{1,0} fusion(%x, %w), calls=%fused, backend_config={"estimated_cycles":"70"}
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%x)
}

%never (t.1: f32[]) -> f32[] {
  ROOT %t.1 = f32[] parameter(0)
}

ENTRY %main (a: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%never, body=%body, TRIPS
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"6"},"estimated_cycles":"9223372036854775807"}'


def test_a_loop_runs_its_body_as_often_as_it_says():
    module = Module(LOOP.replace("TRIPS", TRIPS))
    (product,) = module.products()
    assert (product.kind, product.name, product.times) == ("dot", "dot.1", 6)
    assert product.operands == ((4, 8), (8, 16))
    assert product.flops == 2 * 4 * 8 * 16
    assert module.flops() == 6 * 2 * 4 * 8 * 16
    # Six times 70; 2^63 - 1 is how the compiler says that it does not know.
    assert module.cycles() == (420, 0)


def test_a_loop_of_unknown_length_counts_once():
    assert Module(LOOP.replace("TRIPS", "metadata={}")).flops() == 2 * 4 * 8 * 16


def entry(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return Module(f"HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}\n")


def test_kernels_by_their_operands():
    module = entry(
        "%n = s32[17]{0} parameter(0)",
        "%x = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(1)",
        "%w = bf16[16,64,32]{2,1,0} parameter(2)",
        "%dy = bf16[512,32]{1,0} parameter(3)",
        f'%meta = (s32[17]{{0}}) custom-call(%n), {TPU_KERNEL}, metadata={{op_name="ragged-dot"}}',
        f"%gmm.1 = bf16[512,32]{{1,0}} custom-call(%n, /*index=1*/%x, %w), {TPU_KERNEL}",
        f"%k = bf16[512,64]{{1,0}} custom-call(%n, %dy, %w), {TPU_KERNEL}, "
        'metadata={op_name="f/jit(gmm)"}',
        f"%t_tgmm__.4 = bf16[16,64,32]{{2,1,0}} custom-call(%n, %x, %dy), {TPU_KERNEL}",
        f"%splash = bf16[512,64]{{1,0}} custom-call(%n, %x, %x), {TPU_KERNEL}",
    )
    products = module.products()
    assert [p.name for p in products] == ["gmm.1", "k", "t_tgmm__.4"]
    assert [p.flops for p in products] == [2 * 512 * 64 * 32] * 3
    assert module.cycles() == (0, 5)


def test_a_product_with_batches_that_tpu_writes_as_a_convolution():
    # [16, 7, 3] x [16, 7, 5] -> [16, 3, 5], contracted over 7: what the dense weight gradient of
    # lax.ragged_dot becomes.  Counted naively, the window of 16 would make it 16 times as much.
    module = entry(
        "%x = bf16[16,7,3]{2,1,0} parameter(0)",
        "%y = bf16[16,7,5]{2,1,0} parameter(1)",
        "ROOT %c = bf16[16,3,5]{2,1,0} convolution(%x, %y), "
        "window={size=16 stride=15 lhs_dilate=16}, dim_labels=0fb_0io->0bf",
    )
    assert module.flops() == 2 * 16 * 7 * 3 * 5


def test_a_plain_product_as_a_convolution():
    module = entry(
        "%x = f32[8,16]{1,0} parameter(0)",
        "%w = f32[16,4]{1,0} parameter(1)",
        "ROOT %c = f32[8,4]{1,0} convolution(%x, %w), dim_labels=bf_io->bf",
    )
    assert module.flops() == 2 * 8 * 16 * 4


def test_padding_of_a_window_meets_no_input():
    # Length 4, kernel 3, padded by one on both sides: 2 + 3 + 3 + 2 places.
    module = entry(
        "%x = f32[1,4,2]{2,1,0} parameter(0)",
        "%w = f32[3,2,5]{2,1,0} parameter(1)",
        "ROOT %c = f32[1,4,5]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, "
        "dim_labels=b0f_0io->b0f",
    )
    assert module.flops() == 2 * 10 * 2 * 5


def test_branches_count_all():
    text = LOOP.replace(
        "while(%a), condition=%never, body=%body, TRIPS",
        "conditional(%a, %a, %a), branch_computations={%body, %never}",
    )
    assert Module(text).flops() == 2 * 4 * 8 * 16


def test_what_this_machine_compiles():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = jax.ShapeDtypeStruct((32, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), "f4")
    module = Module(jax.jit(run).lower(*shapes).compile().as_text())
    assert module.flops() == 5 * 2 * 32 * 16 * 16


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("nothing")
