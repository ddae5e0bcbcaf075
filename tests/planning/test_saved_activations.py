"""What the backward pass reads of the forward pass, in a module by hand."""

from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.planning.memory import saved_activations

CARRY = "(s32[], f32[8], f32[6,8], bf16[6,16], f32[6,4])"
TEXT = f"""HloModule m

%forward (t: {CARRY}) -> {CARRY} {{
  %t = {CARRY} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  %kept = f32[6,8]{{1,0}} get-tuple-element(%t), index=2
  %small = bf16[6,16]{{1,0}} get-tuple-element(%t), index=3
  %weights = f32[6,4]{{1,0}} get-tuple-element(%t), index=4
  %x.1 = f32[8]{{0}} negate(%x)
  %kept.1 = f32[6,8]{{1,0}} dynamic-update-slice(%kept, %x, %i)
  %small.1 = bf16[6,16]{{1,0}} dynamic-update-slice(%small, %x, %i)
  ROOT %r = {CARRY} tuple(%i, %x.1, %kept.1, %small.1, %weights)
}}

%condition (t: {CARRY}) -> pred[] {{
  %n = s32[] constant(6)
  ROOT %l = pred[] compare(%n, %n), direction=LT
}}

ENTRY %main (p: {CARRY}) -> {CARRY} {{
  %p = {CARRY} parameter(0)
  %f = {CARRY} while(%p), condition=%condition, body=%forward, metadata={{op_name="jvp()/while"}}
  %a = s32[] get-tuple-element(%f), index=0
  %b = f32[8]{{0}} get-tuple-element(%f), index=1
  %c = f32[6,8]{{1,0}} get-tuple-element(%f), index=2
  %d = bf16[6,16]{{1,0}} get-tuple-element(%f), index=3
  %e = f32[6,4]{{1,0}} get-tuple-element(%f), index=4
  %d.1 = bf16[6,16]{{1,0:S(1)}} copy(%d)
  %q = {CARRY} tuple(%a, USED, %c, %d.1, %e)
  ROOT %g = {CARRY} while(%q), condition=%condition, body=%forward, METADATA
}}
"""
BACKWARD = 'metadata={op_name="transpose(jvp())/while"}'


def test_what_the_forward_loop_writes_and_the_backward_loop_reads():
    text = TEXT.replace("USED", "%b").replace("METADATA", BACKWARD)
    # 6 x 8 float32, 6 x 16 bfloat16 that a copy moves, the last 8 float32, and not the weights,
    # which pass the loop as they are.
    assert saved_activations(Module(text)) == 192 + 192 + 32


def test_nothing_is_kept_where_nothing_runs_backward():
    text = TEXT.replace("USED", "%b").replace("METADATA", 'metadata={op_name="jvp()/while"}')
    assert saved_activations(Module(text)) == 0
