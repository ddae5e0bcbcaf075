"""Every router takes part in the comparison of routers, with settings that are valid."""

import pytest

from benchmarks.router_cases import CASES, FITTED, SEVERAL_SEEDS, flags_of
from benchmarks.routers import apart
from dynmoe_jax.command_line import parse
from dynmoe_jax.registry import ROUTERS


@pytest.mark.parametrize("name", CASES)
def test_settings_of_a_case_are_valid(name):
    cfg, _ = parse(["--config=configs/quickstart.py", "--workdir=none", *flags_of(name)])
    wanted = CASES[name].get("moe.router")
    assert [moe.router for moe in cfg.model.moe_settings] == [wanted] * (4 if wanted else 0)


def test_every_router_is_compared():
    compared = {case["moe.router"] for case in CASES.values() if "moe.router" in case}
    assert compared == set(ROUTERS) - set(FITTED)
    assert set(SEVERAL_SEEDS) <= set(CASES)


def test_names_that_would_cover_each_other_are_moved_apart():
    assert apart([0.0, 1.0, 1.0, 1.1, 5.0], 1.0) == pytest.approx([-0.58, 0.42, 1.42, 2.42, 4.42])
