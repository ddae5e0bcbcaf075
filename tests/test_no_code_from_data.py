"""Loading executes nothing: no pickle, no eval, in any file of the package.

Config files are the exception, by design: they are Python, and belong to whoever starts the run.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dynmoe_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("pandas", "read_pickle")}


def offences(source):
    """What in a source could run code from data: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [(node.module or "").split(".")[0]]
        else:
            named = []
        yield from ((node.lineno, name) for name in named if name in MODULES)
        if not isinstance(node, ast.Call):
            continue
        call = node.func
        if isinstance(call, ast.Name) and call.id in BUILTINS:
            yield node.lineno, call.id
        loader = getattr(getattr(call, "value", None), "id", ""), getattr(call, "attr", "")
        if loader in LOADERS:
            yield node.lineno, ".".join(loader)
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True) is not False:
                yield node.lineno, "allow_pickle"


def test_no_file_runs_code_from_data():
    found = {str(path): list(offences(path.read_text(encoding="utf-8"))) for path in FILES}
    assert len(found) > 100
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle.x",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
    ],
)
def test_offences_are_seen(source):
    assert list(offences(source))


def test_harmless_likes_of_them_are_not():
    assert not list(offences("step.lower(x).compile()\nnp.load(path, allow_pickle=False)"))
