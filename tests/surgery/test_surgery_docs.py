"""The documentation of surgery says what is there, and what it shows works."""

import inspect
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from dynmoe_jax.edits.roles import Role
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.registry import PLUGIN_MODULE, load_plugin
from dynmoe_jax.surgery import operations
from dynmoe_jax.surgery.arguments import parse
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.partitions import PARTITIONS
from dynmoe_jax.surgery.recipes import command as recipe_command
from dynmoe_jax.surgery.report.command import command_of
from dynmoe_jax.surgery.report.tables import OPERATION_COLUMNS, operation_rows
from tests.in_memory_surgery import drawn, result_of, settings
from tests.surgery.test_surgery_page import record

assert operations  # importing them registers them

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "surgery.md"


@pytest.fixture
def sharpen(tmp_path):
    """The operation of the page, from a file of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 45
    file = tmp_path / "sharpen.py"
    file.write_text(code, encoding="utf-8")
    load_plugin(str(file))
    yield OPERATIONS["sharpen"]
    del OPERATIONS._kinds["sharpen"], sys.modules[f"{PLUGIN_MODULE}sharpen"]


def test_every_operation_has_its_row():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first, *columns = OPERATION_COLUMNS
    rows = [[first, "in short", *columns]]
    for name, *rest in operation_rows():
        about = inspect.getdoc(OPERATIONS[name]).splitlines()[0].rstrip(".")
        rows.append([f"`{name}`", about, *rest])
    wanted = [f"| {' | '.join(row)} |".replace("``", "`") for row in rows]
    missing = [row for row in wanted if row not in lines]
    assert not missing, "rows that docs/surgery.md lacks:\n" + "\n".join(missing)


def test_every_way_to_split_has_its_row():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    starts = [f"| `{name}` | " for name in PARTITIONS]
    assert not [start for start in starts if not any(line.startswith(start) for line in lines)]


def test_every_field_of_the_record_is_explained():
    text, example = PAGE.read_text(encoding="utf-8"), record()
    names = [*example, *example["before"], *example["parents"][0], "kl", "agreement", "left_out"]
    assert not [name for name in names if f"`{name}`" not in text]


def test_the_operation_of_the_page_works(sharpen):
    parent = settings(moe={"num_experts": 4, "hidden_width": 8})
    arrays = drawn(parent)
    operation = sharpen(factor=1.5)
    for role, factor in ((Role.PARAMETER, 1.5), (Role.FIRST, 1 / 1.5), (Role.SECOND, 1 / 2.25)):
        _, result = result_of(operation, (parent, arrays), role=role)
        for place, values in arrays.items():
            times = factor if place.array_name == "router_DE" else 1.0
            np.testing.assert_allclose(result[place], times * values, rtol=1e-6)
    assert operation.promise([parent]) is None
    assert sharpen(factor=1.0).promise([parent]) == 1e-5
    with pytest.raises(ConfigError, match="dense model"):
        operation.result([settings()])


def test_the_command_of_a_plugin_names_its_file(sharpen, tmp_path):
    line = command_of(record("sharpen"))
    assert f"--plugin={tmp_path / 'sharpen.py'}" in line


PAGES = [PAGE, ROOT / "README.md", ROOT / "docs" / "recipes.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page, sharpen):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python -m dynmoe_jax\.surgery (.+)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = [word for word in shlex.split(command) if not word.startswith("--plugin=")]
        (recipe_command.parse if recipe_command.is_of_recipe(words) else parse)(words)
