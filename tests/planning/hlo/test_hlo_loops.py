"""Loops, branches and sources of a module as the compiler for TPUs writes it."""

import pytest

from dynmoe_jax.planning.hlo.module import Module

TEXT = """HloModule step, is_scheduled=true

FileNames
1 "/home/me/project/dynmoe_jax/model/decoder.py"
2 "/usr/lib/python3/site-packages/flax/nnx/nn/linear.py"

FunctionNames
1 "Decoder.hidden.<locals>.apply_group"
2 "Linear.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=9}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%inner_body (i: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %i = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%i), index=1
  %w = f32[8,8]{1,0} constant({...})
  %d = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, metadata={stack_frame_id=2}
  ROOT %o = (s32[], f32[4,8]{1,0}) tuple(%x, %d)
}

%inner_condition (i.1: (s32[], f32[4,8])) -> pred[] {
  %i.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%i.1), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%n, %five), direction=LT
}

%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %inner = (s32[], f32[4,8]{1,0}) while(%t), condition=%inner_condition, body=%inner_body
}

%compared (n.2: s32[]) -> pred[] {
  %n.2 = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %less.2 = pred[] compare(%n.2, %three), direction=LT
}

%condition (t.1: (s32[], f32[4,8])) -> pred[] {
  %t.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%t.1), index=0
  ROOT %f = pred[] fusion(%n.1), kind=kLoop, calls=%compared
}

%by_data (t.2: (s32[], f32[4,8])) -> pred[] {
  %t.2 = (s32[], f32[4,8]{1,0}) parameter(0)
  %n.3 = s32[] get-tuple-element(%t.2), index=0
  ROOT %less.3 = pred[] compare(%n.3, %n.3), direction=LT
}

%nothing (z: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  ROOT %z = (s32[], f32[4,8]{1,0}) parameter(0)
}

ENTRY %main (a: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %a = (s32[], f32[4,8]{1,0}) parameter(0)
  %kernel = f32[4,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={
"block": "{\\"block_q\\": 512}"
}}, metadata={stack_frame_id=1}
  ROOT LOOP
}
"""
DOT = 2 * 4 * 8 * 8


def module(loop):
    return Module(TEXT.replace("LOOP", loop))


def test_nested_loops_multiply_by_the_constants_of_their_conditions():
    loops = module("%loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body")
    # Three rounds, bounded within a fusion, of five rounds.
    assert [(p.name, p.times) for p in loops.products()] == [("d", 15)]
    assert loops.flops() == loops.flops(usual=True) == 15 * DOT


def test_a_loop_that_data_bound_runs_once_at_most_and_usually_never():
    loops = module("%loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%by_data, body=%body")
    assert loops.flops() == 5 * DOT
    assert loops.flops(usual=True) == 0


@pytest.mark.parametrize("branches", ["%nothing, %body", "%body, %nothing"])
def test_usually_a_conditional_takes_its_shortest_branch(branches):
    text = "%c = (s32[], f32[4,8]{1,0}) conditional(%a, %a, %a), branch_computations={BRANCHES}"
    branching = module(text.replace("BRANCHES", branches))
    assert branching.flops() == 5 * DOT
    assert branching.flops(usual=True) == 0


def test_sources_name_the_innermost_function_of_this_package():
    loops = module("%loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body")
    by_name = {i.name: i for _, _, i in loops.instructions()}
    # The frame of %d is flax's, called by the decoder.
    for name in ("d", "kernel"):
        module_name = loops.sources.module(by_name[name].frame)
        assert module_name == "model.decoder: Decoder.hidden.apply_group"
    assert loops.sources.module(by_name["a"].frame) == ""


def test_metadata_with_line_breaks_belong_to_their_instruction():
    loops = module("%loop = (s32[], f32[4,8]{1,0}) while(%a), condition=%condition, body=%body")
    by_name = {i.name: i for _, _, i in loops.instructions()}
    assert "block_q" in by_name["kernel"].text
    assert by_name["kernel"].frame == 1


def test_bytes_of_results():
    entry = """ENTRY %m (p: bf16[]) -> bf16[] {
  %p = (bf16[3,5]{1,0:T(8,128)(2,1)}, pred[7]{0}, f32[2,2]{1,0:T(8,128)S(1)}, s4[3]{0}) parameter(0)
}
"""
    (p,) = Module(entry).computations["m"].values()
    # Three values of four bits fill two bytes.
    assert p.sizes == (30, 7, 16, 2)
    # S(1) is a chip's fast memory.
    assert p.main_memory_bytes == 39
