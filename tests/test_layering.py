"""Imports point one way, from each room to those below it, without exceptions."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def contract():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return contract


def test_no_module_imports_from_a_layer_above(monkeypatch):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def test_every_part_of_the_package_has_a_layer(contract):
    layered = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
    parts = {
        f"dynmoe_jax.{path.stem}"
        for path in (ROOT / "dynmoe_jax").iterdir()
        if (path / "__init__.py").exists() or (path.suffix == ".py" and path.stem != "__init__")
    }
    assert parts == layered
    assert not contract.get("ignore_imports")
