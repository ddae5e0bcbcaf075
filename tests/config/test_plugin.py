"""Files that ``--plugin`` names: what they register is there, and every mistake is one sentence."""

import dataclasses
import sys

import pytest

from dynmoe_jax import command_line, config
from dynmoe_jax.console import console
from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import EXPERTS, ROUTERS
from dynmoe_jax.routing import Router, TopP

FILE = '''"""A router of one's own."""

import dataclasses

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import TopP


@ROUTERS.register("patient")
@dataclasses.dataclass(frozen=True)
class Patient(TopP):
    """Top-P with a number that does nothing."""

    patience: int = model_setting(3, "of the router", low=0)
'''


@dataclasses.dataclass(frozen=True)
class OneMore(TopP):
    """A router with a setting."""

    patience: int = model_setting(3, "of the router", low=0)


@pytest.fixture(autouse=True)
def forgotten():
    """Plug-ins of one test are unknown to the next."""
    yield
    for name in [name for name in sys.modules if name.startswith("dynmoe_jax_plugin_")]:
        del sys.modules[name]
    ROUTERS._kinds.pop("patient", None)


def refusal(*arguments):
    with pytest.raises(config.ConfigError) as caught:
        command_line.load_plugins(arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_kind_that_leaves_out_a_method_is_refused_by_name():
    unfinished = dataclasses.dataclass(frozen=True)(type("Unfinished", (Router,), {}))
    with pytest.raises(ValueError, match="router 'unfinished' has to define __call__, bounds"):
        ROUTERS.register("unfinished")(unfinished)
    assert "unfinished" not in ROUTERS


@pytest.mark.parametrize("spelling", ["--plugin={}", "--plugin {}"])
def test_what_a_file_registers_has_settings(spelling, tmp_path):
    file = tmp_path / "patient.py"
    file.write_text(FILE)
    arguments = ["--a", *spelling.format(file).split(" "), "b"]
    assert command_line.load_plugins(arguments) == ["--a", "b"]
    moe = config.MoE(router="patient", patient={"patience": 7})
    assert moe.route.patience == 7


def test_a_file_that_is_named_twice_is_loaded_once(tmp_path):
    file = tmp_path / "patient.py"
    file.write_text(FILE)
    assert command_line.load_plugins([f"--plugin={file}", f"--plugin={file}"]) == []


def test_help_has_the_settings_of_a_plugin(tmp_path, monkeypatch, capsys):
    file = tmp_path / "patient.py"
    file.write_text(FILE)
    monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--plugin={file}", "--help"])
    assert command_line.run(lambda *_: pytest.fail("ran"), "") == 0
    assert "model.moe.patient.patience" in capsys.readouterr().out


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("")
    for path in ("nowhere.py", str(tmp_path), f"{tmp_path}/text.txt", ""):
        assert f"--plugin={path} is no Python file" in refusal(f"--plugin={path}")
    assert "--plugin= is no Python file" in refusal("--plugin")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import nowhere_at_all", "fails: ModuleNotFoundError"),
        ("def f(:", "fails: SyntaxError"),
        ("1 / 0", "fails: ZeroDivisionError: division by zero"),
        ("raise ValueError('one\\ntwo')", "fails: ValueError: one two"),
        (FILE.replace('"patient"', '"top_p"'), "router 'top_p' is registered already"),
        (FILE.replace('"patient"', '"not a name"'), "with a name"),
        (FILE.replace("patience", "update"), "'update', which is a method of ConfigDict"),
    ],
)
def test_a_file_that_fails_is_refused(body, sentence, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(body)
    assert sentence in refusal(f"--plugin={file}")


@pytest.mark.parametrize("name", ["num_experts", "row_budget"])
def test_a_kind_with_the_name_of_another_setting_is_refused(name):
    """One of the two would be lost: both are groups or settings of ``config.model.moe``."""
    sentence = f"'{name}' has the name of another setting of MoE; rename it"
    with ROUTERS.temporarily(name, OneMore), pytest.raises(config.ConfigError, match=sentence):
        config.MoE()
    assert config.MoE().num_experts


def test_a_kind_without_settings_may_have_the_name_of_another_registry_s():
    """The group is that of the kind that has settings, whatever the other choice names."""
    for experts in ("swiglu", "relu"):
        moe = config.MoE(router="relu", experts=experts, relu={"experts_per_token": 3.0})
        assert config.Config(model=config.Model(moe=moe)).model.moe.route.experts_per_token == 3.0
        assert type(moe.expert_kind) is EXPERTS[experts]
    moe = config.MoE(router="top_k", experts="relu", relu={"experts_per_token": 3.0})
    with pytest.raises(config.ConfigError, match=r"relu.experts_per_token=3.0 has no effect"):
        config.Config(model=config.Model(moe=moe))


def test_another_file_of_the_same_name_is_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "patient.py").write_text(FILE)
    command_line.load_plugins([f"--plugin={tmp_path}/a/patient.py"])
    assert "rename the file" in refusal(f"--plugin={tmp_path}/b/patient.py")


def test_a_program_refuses_a_plugin_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--plugin={tmp_path}/nowhere.py"])
    assert command_line.run(lambda *_: pytest.fail("ran"), "") == command_line.EXIT_BAD_INPUT
    assert "is no Python file" in " ".join(capsys.readouterr().out.split())
