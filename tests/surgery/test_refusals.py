"""Requests that cannot be served: refused before an array is read, in a sentence that helps."""

import os
import shutil
import socket

import pytest

from dynmoe_jax.console import console
from dynmoe_jax.data import train_tokenizer
from dynmoe_jax.fields import ConfigError
from dynmoe_jax.model.flops import forward_flops
from dynmoe_jax.model.parameters import count_parameters
from dynmoe_jax.runs.formatting import compact
from dynmoe_jax.runs.load import OpenedRun
from dynmoe_jax.runs.text import TRAINED
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.storage.target import free_place, written_whole
from tests.small_parent import UPDATES, main


@pytest.fixture(autouse=True)
def _nothing_is_read(monkeypatch):
    """No array, that is."""

    def read(*_, **__):
        raise AssertionError("An array was read.")

    for name in ("read", "slices", "params"):
        monkeypatch.setattr(OpenedRun, name, read)


@pytest.fixture
def said(capsys):
    return lambda: " ".join(capsys.readouterr().out.split())


@pytest.fixture
def copied(branches, tmp_path):
    """A model that may be spoiled."""
    return shutil.copytree(branches[0], tmp_path / "copied")


def test_a_plan_is_arithmetic(branches, tmp_path, monkeypatch, dense_settings, said):
    monkeypatch.setattr(console, "width", 200)
    flags = ("--num_experts=4", "--dtype=bfloat16", "--plan")
    assert main("upcycle", f"--from={branches[0]}", f"--to={tmp_path / 'to'}", *flags) == 0
    text, model = said(), dense_settings.model
    assert f"parameters {compact(count_parameters(model))}" in text
    assert f"forward {compact(forward_flops(model, 1.0, dense_settings.data.seq_len, []))}" in text
    assert "keys and values, bytes a token 128 128" in text
    assert "All experts of a layer are equal" in text
    assert "rounded to bfloat16" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["upcycel"], "'upcycel' is no operation; did you mean upcycle?"),
        (
            ["upcycle", "--num_expert=4"],
            "--num_expert is no flag of upcycle; did you mean --num_experts?",
        ),
        (["upcycle", "--form=x"], "--form is no flag of upcycle; did you mean --from?"),
        (["stack", "--from=x", "--to=y", "z"], "unrecognized arguments: z"),
        (["stack", "--from=x"], "required: --to"),
        (["stack", "--from=x", "--to=y", "--times=1"], "--times=1 must be at least 2"),
        (["upcycle", "--from=x", "--to=y", "--noise=nan"], "--noise=nan must be a finite number"),
        (["upcycle", "--from=x", "--to=y", "--from=z"], "takes 1 model, and 2 are named"),
        (["average", "--from=x", "--to=y"], "takes at least 2 models, and 1 is named"),
        (["stack", "--from=~nobody-has-this/x", "--to=y"], "--from=~nobody-has-this/x is no run's"),
        (["stack", f"--from={'x' * 300}", "--to=y"], "is no run's folder"),
        (["stack", "--from=x", f"--to={'y' * 300}"], "cannot be a folder (File name too long)"),
        (["stack", "--from=x", f"--to={'y' * 240}"], "cannot be a folder (File name too long)"),
        (["stack", "--from=x", "--to=tests/conftest.py/y"], "cannot be a folder (Not a directory)"),
        (["stack", "--from=x", "--to=tests"], "--to='tests' is not empty"),
        (["stack", "--from=x", "--to=y\udcff"], "is no name in UTF-8"),
        (["rebuild", "--from=tests", "--to=y"], "has no surgery.json"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_sentence(flags, sentence, said):
    assert main(*flags) == 2
    assert sentence in said()


@pytest.mark.parametrize("layers", ["7-2", "1,", "-1", "0-2", "x"])
def test_layers_that_are_none_are_named(branches, tmp_path, layers, said):
    flags = (f"--from={branches[0]}", f"--to={tmp_path / 'to'}", f"--layers={layers}", "--plan")
    assert main("upcycle", *flags) == 2
    assert f"--layers={layers} names " in said()


def test_every_operation_has_help(capsys):
    for name in ("--help", *(f"{name} --help" for name in OPERATIONS)):
        with pytest.raises(SystemExit) as end:
            main(*name.split())
        assert end.value.code == 0
    assert main("list") == 0
    assert all(name in capsys.readouterr().out for name in ["upcycle"])


def test_models_have_to_share_a_tokenizer(branches, copied, tmp_path, said):
    flags = [f"--from={branches[0]}", f"--from={copied}", f"--to={tmp_path / 'to'}", "--plan"]
    train_tokenizer(["another text of other words\n" * 40], 280, copied / TRAINED)
    assert main("average", *flags) == 2
    assert "has changed since the checkpoint was written" in said()
    (copied / TRAINED).unlink()
    assert main("average", *flags) == 2
    assert f"--from={copied} holds no tokenizer" in said()


def test_text_is_what_the_parent_has_or_what_is_named(copied, tmp_path, said):
    flags = ["stack", f"--from={copied}", f"--to={tmp_path / 'to'}", "--plan"]
    assert main(*flags, "--data=text:/nowhere/*.txt") == 2
    assert "matches no file" in said()
    # Text that is prepared again does not go into the parent's folder.
    shutil.rmtree(copied / "data")
    assert main(*flags) == 0
    assert not (copied / "data").exists()


def test_a_record_that_is_not_whole_is_named(copied, tmp_path, said):
    (copied / "surgery.json").write_text('{"operation": ')
    for command in (["rebuild"], ["stack", "--plan"]):
        assert main(*command, f"--from={copied}", f"--to={tmp_path / 'to'}") == 2
        assert "surgery.json is not whole" in said()


def test_a_parent_is_read_while_it_is_being_trained(copied, tmp_path, said):
    """A checkpoint that is being written has another name, and one that is damaged is passed."""
    checkpoints = copied / "checkpoints"
    shutil.copytree(checkpoints / str(UPDATES), checkpoints / "8.orbax-checkpoint-tmp-1")
    shutil.copytree(checkpoints / str(UPDATES), checkpoints / "9")
    shutil.rmtree(checkpoints / "9" / "state")
    assert main("stack", f"--from={copied}", f"--to={tmp_path / 'to'}", "--plan") == 0
    assert "step 9 is damaged" in said()
    shutil.rmtree(checkpoints)
    assert main("stack", f"--from={copied}", f"--to={tmp_path / 'to'}", "--plan") == 2
    assert "is no run's folder" in said()


def test_the_target_may_be_a_link_or_empty(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "missing", "self"):
        (tmp_path / f"to_{name}").symlink_to(tmp_path / name)
    (tmp_path / "self").symlink_to(tmp_path / "to_self")
    for name in ("empty", "missing"):
        place = free_place(tmp_path / f"to_{name}")
        with written_whole(place) as folder:
            (folder / "file").touch()
        assert (tmp_path / name / "file").is_file()
        assert (tmp_path / f"to_{name}").is_symlink()
    for name, why in (("full", "not empty"), ("self", "link"), ("empty", "not empty")):
        with pytest.raises(ConfigError, match=why):
            free_place(tmp_path / f"to_{name}")


def test_nothing_of_others_is_removed(tmp_path):
    host = socket.gethostname()
    dead, living = (f"to.unfinished-{host}-{n}" for n in (2**22 + 1, os.getppid()))
    for name in ("to.unfinished", f"to.unfinished-{host}-x", dead, living):
        (tmp_path / name).mkdir()
    place = free_place(tmp_path / "to")
    with pytest.raises(ConfigError, match="cannot be made"), written_whole(place):
        (place / "of another").mkdir(parents=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"to", "to.unfinished", f"to.unfinished-{host}-x", living}
    assert [path.name for path in place.iterdir()] == ["of another"]
