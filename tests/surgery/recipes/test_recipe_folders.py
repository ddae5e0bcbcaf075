"""Folders of recipes: what steps that were killed or failed leave behind, and times of steps."""

import importlib
import os
import socket

import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.surgery.measuring.statistics import FOLDER
from dynmoe_jax.surgery.recipes import Export
from dynmoe_jax.surgery.recipes.recipe import Asked, Plan
from dynmoe_jax.surgery.recipes.run import SECONDS, _say_others, _seconds, run_recipe
from dynmoe_jax.surgery.recipes.step import STEPS_FOLDER
from dynmoe_jax.surgery.storage.target import UNFINISHED, remove_unfinished

TEXT = '''"""Nothing."""
from dynmoe_jax.surgery.recipes import Recipe, Train, sizes
def get_recipe(size, seed, data):
    return Recipe((Train("dense", sizes.dense(size, seed, data)),))
'''


def test_unfinished_folders_of_processes_that_ended_go_whatever_step_they_were_of(tmp_path):
    host, ended = socket.gethostname(), 2**31 - 1
    for name in (f"old-1{UNFINISHED}{host}-{ended}", f"new-2{UNFINISHED}{host}-{os.getppid()}"):
        (tmp_path / name).mkdir()
    (tmp_path / "whole-3").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["new", "whole"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_leaves_its_files_or_nothing(tmp_path, monkeypatch, fails):
    def export_model(_, folder, dtype):
        unfinished = folder.with_name(folder.name + ".unfinished")
        unfinished.mkdir(parents=True)
        (unfinished / "config.json").write_text(dtype)
        if fails:
            raise ConfigError("disk")
        unfinished.replace(folder)

    module = importlib.import_module("dynmoe_jax.interop.export_model")
    monkeypatch.setattr(module, "export_model", export_model)
    job, folder = {"from": "run", "dtype": "bfloat16"}, tmp_path / "steps" / "exported"
    if fails:
        with pytest.raises(ConfigError, match="disk"):
            Export.do(job, folder)
        assert list(folder.parent.iterdir()) == []
    else:
        assert Export.do(job, folder) == 0
        assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_seconds_of_a_step_are_those_of_the_last_time_and_a_torn_line_is_none(tmp_path):
    lines = '{"step": "a", "seconds": 5.0}\n{"step": "a", "seconds": 3.0}\n{"step": "b", "sec'
    (tmp_path / SECONDS).write_bytes(lines.encode() + b'\n[1]\n{"step": "c"}\n\xff\n')
    assert _seconds(tmp_path) == {"a": 3.0}


def test_workdir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "recipe.py").write_text(TEXT)
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "logs").write_text("")
    for name in ("taken", "folder"):
        with pytest.raises(ConfigError, match=f"{name} cannot be written"):
            run_recipe(Asked(tmp_path / "recipe.py", tmp_path / name, "tiny"))


@pytest.mark.parametrize(("there", "said"), [(FOLDER, False), ("other-0123", True)])
def test_statistics_of_operations_are_not_taken_for_a_step(tmp_path, capsys, there, said):
    (tmp_path / STEPS_FOLDER / there).mkdir(parents=True)
    _say_others(Plan("", "", (), {}), tmp_path)
    assert (there in capsys.readouterr().out) == said
