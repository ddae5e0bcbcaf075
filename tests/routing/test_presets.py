"""Every preset of a router: is accepted, names its command, and weighs what its router gives."""

import ast
import re
import shlex

import pytest

from dynmoe_jax import config
from dynmoe_jax.registry import all_kinds
from dynmoe_jax.routing.losses import coefficients
from tests.small_presets import FOLDER, NAMES, settings_of


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_names_its_command(name):
    cfg = config.from_config_dict(settings_of(name))
    assert cfg.model.num_moe_layers
    about = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    commands = re.sub(r"\\\n\s*", "", about).splitlines()
    wanted = ["python", "train.py", f"--config=configs/routers/{name}.py"]
    assert any(shlex.split(line)[:3] == wanted for line in commands if "train.py" in line)
    assert re.search(r"arXiv \d{4}\.\d{5}|\(\d{4}\)", about), "names no paper"


@pytest.mark.parametrize("name", NAMES)
def test_it_weighs_only_losses_that_its_router_can_serve(name):
    cfg = config.from_config_dict(settings_of(name))
    moe = cfg.model.moe_settings[0]
    bounds = moe.route.bounds(moe.num_experts)
    assert bounds.fewest <= bounds.expected <= bounds.slots
    gives = moe.route.gives | moe.route.parameters(cfg.model.width, moe.num_experts).keys()
    for loss, (weight,) in coefficients(all_kinds(cfg.loss), [moe.route]).items():
        assert not weight or all_kinds(cfg.loss)[loss].needs <= gives
