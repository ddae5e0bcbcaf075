"""The command that a study's page names."""

import shlex

import pytest

from dynmoe_jax.study.__main__ import parser, request_of
from dynmoe_jax.study.comparison.plan import Request
from dynmoe_jax.study.record import command_of


def given(command):
    return request_of(parser().parse_args(shlex.split(command)[3:]))


def test_command_asks_for_the_same(tmp_path):
    (tmp_path / "items").mkdir()
    (tmp_path / "a text.txt").write_text("one\n")
    asked = Request(
        "laptop",
        tmp_path / "a study",
        2,
        ("dynamic", "top_2"),
        (3, 2),
        f"text:{tmp_path / 'a text.txt'}",
        tmp_path / "items",
        (0.001, 3e-5),
        2,
    )
    assert given(command_of(asked)) == asked


@pytest.mark.parametrize("size", ["tiny", "laptop", "paper"])
def test_command_leaves_out_what_is_usual(size, tmp_path):
    asked = given(f"python -m dynmoe_jax.study --size={size} --workdir={tmp_path}")
    command = command_of(asked, ["--plugin=my router.py"])
    yes = " --yes" if size == "paper" else ""
    assert command == (
        f"python -m dynmoe_jax.study --size={size} --workdir={tmp_path}{yes} "
        "'--plugin=my router.py'"
    )
