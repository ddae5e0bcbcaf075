"""Schedules that are played by hand."""

import numpy as np
import pytest

from dynmoe_jax.hardware.chips import Chip
from dynmoe_jax.planning.hlo.collectives import HOP_SECONDS, Network
from dynmoe_jax.planning.hlo.module import Module
from dynmoe_jax.planning.hlo.schedule import Schedule

LINK = 1e9
# A cycle is a microsecond.
CHIP = Chip(1e12, 1e9, "TPU", links=6, link_bytes_per_s=LINK, clock_hz=1e6, product_width=128)


class Pair:
    """A mesh of two chips side by side."""

    def __init__(self):
        self.devices = np.array([self.Device((0, 0, 0)), self.Device((1, 0, 0))], dtype=object)
        self.axis_names, self.size = ("data",), 2

    class Device:
        def __init__(self, coords):
            self.coords, self.slice_index = coords, 0


def played(entry, others=""):
    text = f"HloModule m\n\n{others}\nENTRY %main (p: f32[1000]) -> f32[1000] {{\n{entry}\n}}\n"
    return Schedule(Module(text), CHIP, Network(Pair(), CHIP), rows=0)


def work(name, cycles):
    config = f'backend_config={{"estimated_cycles":"{cycles}"}}'
    return f"  %{name} = f32[1000]{{0:S(1)}} fusion(%p), kind=kLoop, calls=%f, {config}"


PARAMETER = "  %p = f32[1000]{0} parameter(0)"
FUSED = "%f (x: f32[1000]) -> f32[1000] {\n  ROOT %x = f32[1000]{0} parameter(0)\n}\n"
# Half of 4000 bytes over one link, and one hop.
GATHER_US = 2 + 1e6 * HOP_SECONDS
GROUPS = "replica_groups={{0,1}}, dimensions={0}"
START = f"  %s = (f32[500]{{0}}, f32[1000]{{0}}) all-gather-start(%p), {GROUPS}"
DONE = "  %d = f32[1000]{0} all-gather-done(%s)"


def microseconds(schedule):
    return 1e6 * schedule.played.compute, 1e6 * schedule.played.waited


def test_a_synchronous_collective_is_waited_for():
    gather = f"  %g = f32[1000]{{0}} all-gather(%p), {GROUPS}"
    schedule = played("\n".join([PARAMETER, work("a", 7), gather]), FUSED)
    assert microseconds(schedule) == pytest.approx((7, GATHER_US))


@pytest.mark.parametrize(("cycles", "waits"), [(1, GATHER_US - 1), (9, 0)])
def test_an_asynchronous_one_hides_behind_what_stands_between(cycles, waits):
    entry = [PARAMETER, work("before", 5), START, work("between", cycles), DONE]
    schedule = played("\n".join(entry), FUSED)
    assert microseconds(schedule) == pytest.approx((5 + cycles, waits))
    ((times, transfer, _),) = schedule.transfers
    assert (times, transfer.axes, transfer.bytes) == (1, "data", 2000)


def test_two_asynchronous_ones_share_the_links():
    second = START.replace("%s", "%s2"), DONE.replace("%s", "%s2").replace("%d", "%d2")
    entry = [PARAMETER, START, second[0], DONE, second[1]]
    assert microseconds(played("\n".join(entry), FUSED)) == pytest.approx((0, 2 * GATHER_US))


def test_collectives_fused_with_products_are_asynchronous():
    gather = f"  %g = f32[1000]{{0}} all-gather(%x), {GROUPS}\n"
    others = FUSED
    for name, target in (("start", "AsyncCollectiveStart"), ("done", "AsyncCollectiveDone")):
        others += f"%{name} (x: f32[1000]) -> f32[1000] {{\n  %x = f32[1000]{{0}} parameter(0)\n"
        others += (
            f'{gather}  ROOT %c = f32[1000]{{0}} custom-call(%g), custom_call_target="{target}"'
        )
        others += "\n}\n"
    entry = [
        PARAMETER,
        "  %s = (f32[500]{0}, f32[1000]{0}) fusion(%p), kind=kCustom, calls=%start",
        work("between", 1),
        "  %e = f32[1000]{0} get-tuple-element(%s), index=1",
        "  %d = f32[1000]{0} fusion(%e), kind=kCustom, calls=%done",
    ]
    schedule = played("\n".join(entry), others)
    assert microseconds(schedule) == pytest.approx((1, GATHER_US - 1))
    assert len(schedule.transfers) == 1


def test_loops_multiply_and_idle_ones_cost_nothing():
    others = FUSED + "%body (p: f32[1000]) -> f32[1000] {\n" + PARAMETER + "\n" + work("a", 3)
    others += "\n}\n%bound (x: f32[1000]) -> pred[] {\n  %n = s32[] constant(6)\n"
    others += "  ROOT %l = pred[] compare(%n, %n), direction=LT\n}\n"
    others += "%by_data (x: f32[1000]) -> pred[] {\n  ROOT %l = pred[] parameter(0)\n}\n"
    loop = "  %w = f32[1000]{0} while(%p), condition=%bound, body=%body"
    assert microseconds(played(f"{PARAMETER}\n{loop}", others)) == pytest.approx((18, 0))
    idle = loop.replace("%bound", "%by_data")
    assert microseconds(played(f"{PARAMETER}\n{idle}", others)) == (0, 0)


def test_gathers_of_rows_cost_their_bytes_whatever_the_compiler_says():
    fused = "%f (x: f32[1000]) -> f32[1000] {\n  %x = f32[1000]{0} parameter(0)\n"
    fused += "  ROOT %g = f32[1000]{0} gather(%x, %x)\n}\n"
    config = 'backend_config={"estimated_cycles":"1"}'
    entry = f"{PARAMETER}\n  %a = f32[1000]{{0}} fusion(%p), kind=kLoop, calls=%f, {config}"
    # 4000 bytes are read and written.
    assert microseconds(played(entry, fused)) == pytest.approx((8, 0))


def test_what_nobody_estimates_is_listed():
    schedule = played(f"{PARAMETER}\n  %s.1 = f32[1000]{{0}} sort(%p), dimensions={{0}}")
    assert microseconds(schedule) == (0, 0)
    assert [o.what for o in schedule.unknown] == ["s"]


def test_collectives_of_other_cores_are_asynchronous_calls():
    others = FUSED + "%inner (x: f32[500]) -> f32[1000] {\n  %x = f32[500]{0} parameter(0)\n"
    others += f"  ROOT %g = f32[1000]{{0}} all-gather(%x), {GROUPS}\n}}\n"
    others += "%outer (y: f32[500]) -> f32[1000] {\n  %y = f32[500]{0} parameter(0)\n"
    others += "  ROOT %h = f32[1000]{0} fusion(%y), kind=kCustom, calls=%inner\n}\n"
    entry = [
        PARAMETER,
        "  %s = ((f32[500]{0}), f32[1000]{0}) call-start(%p), to_apply=%outer",
        work("between", 1),
        "  %d = f32[1000]{0} call-done(%s)",
    ]
    schedule = played("\n".join(entry), others)
    assert microseconds(schedule) == pytest.approx((1, GATHER_US - 1))
    assert len(schedule.transfers) == 1
