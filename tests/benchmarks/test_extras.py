"""Benchmarks run with the extras that they name, and say in one sentence which is missing."""

import ast
import functools
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import command
from dynmoe_jax.config import ConfigError

ROOT = Path(__file__).parents[2]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    extra: {Requirement(text).name for text in PROJECT["optional-dependencies"][extra]}
    for extra in ("bench", "eval")
}
OPTIONAL = set().union(*EXTRAS.values())
HIDE = """
import importlib.metadata
version = importlib.metadata.version
def visible(name):
    if name == "accelerate":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = visible
"""


def source_of(name):
    """Of a module of benchmarks or of the package; None of anything else."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if name.split(".")[0] in ("benchmarks", "dynmoe_jax") and file.is_file():
            return file
    return None


@functools.cache
def imported_by(name):
    """Modules that a module imports; in benchmarks also later, or by starting them as processes."""
    tree = ast.parse(source_of(name).read_text(encoding="utf-8"))
    later = name.startswith("benchmarks")
    found = set()
    for node in ast.walk(tree) if later else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"benchmarks\.\w+", str(node.value)):
            found.add(node.value)
    return found


def optional_packages(name):
    """Those that a module comes to import."""
    seen, waiting, found = set(), [name], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if source_of(name) is None:
            found |= {name.split(".")[0]} & OPTIONAL
        else:
            waiting += imported_by(name)
    return found


def is_command(name):
    text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    return '__name__ == "__main__"' in text and "a process of its own: ``" not in text.lower()


COMMANDS = [name for name in MODULES if is_command(name)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_names_the_extras_that_it_imports(name):
    about = ast.get_docstring(ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text()))
    about = " ".join(about.split())
    named = {e for e in EXTRAS if re.search(rf"extras? (``\w+`` and )?``{e}``", about)}
    brought = set().union(*(EXTRAS[extra] for extra in named))
    assert optional_packages(f"benchmarks.{name}") <= brought


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_ends_in_a_sentence_where_something_is_missing(name):
    """It calls what turns errors for users into one."""
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8"))
    calls = [node.func.id for node in ast.walk(tree.body[-1]) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)]  # fmt: skip
    assert "run" in calls


def test_there_are_benchmarks_to_look_at():
    assert {"generation", "evaluation", "train_step", "kill_campaign"} <= set(COMMANDS)
    assert optional_packages("benchmarks.evaluation") == {"lm_eval", "torch", "transformers"}
    assert optional_packages("benchmarks.train_step") == {"torch", "transformers"}
    assert optional_packages("benchmarks.save_stall") == set()


@pytest.mark.parametrize(
    ("name", "arguments", "extras"),
    [
        ("generation", [], "bench"),
        ("evaluation", ["--model=a", "--data_dir=b"], "bench,eval"),
        ("evaluation_parity", ["--model=a", "--data_dir=b"], "bench,eval"),
        ("train_step", ["--methods=hf_eager"], "bench"),
        ("moe_layer", ["--methods=ours,torch_loop"], "bench"),
    ],
)
def test_nothing_is_done_before_what_is_missing_is_said(monkeypatch, name, arguments, extras):
    """PyTorch is hidden, where it is installed."""
    version = importlib.metadata.version
    benchmark = importlib.import_module(f"benchmarks.{name}")

    def visible(distribution):
        if distribution == "torch":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return version(distribution)

    monkeypatch.setattr("importlib.metadata.version", visible)
    monkeypatch.setattr(benchmark, "pin_threads", lambda _: pytest.fail("began"))
    install = re.escape(f"pip install -e '.[{extras}]'.")
    with pytest.raises(ConfigError, match=rf"torch\b.* missing for this benchmark; {install}"):
        benchmark.main(arguments)


def test_missing_package_of_a_command_is_one_sentence(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.generation", "--model=a.gguf"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.fullmatch(r"error: accelerate.* missing for this benchmark; pip install .*", said)


def test_what_is_too_old_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert set(command.missing("bench")) == EXTRAS["bench"]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    assert command.missing("bench") == []
    command.need("bench")


def test_process_that_ends_early_is_one_sentence(capfd):
    from benchmarks.worker import Worker

    with pytest.raises(SystemExit) as stop:
        command.run(lambda: Worker.of_module("benchmarks.no_such_worker"))
    assert stop.value.code == 1
    printed = capfd.readouterr()
    assert "error: `python -m benchmarks.no_such_worker` ended with exit code 1" in printed.out
    assert "Traceback" not in printed.err
