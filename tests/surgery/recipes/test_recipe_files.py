"""Recipes as files and as a command: what is refused, in one sentence, and what pages name."""

import ast
import re
from pathlib import Path

import pytest

from dynmoe_jax.config import ConfigError
from dynmoe_jax.surgery.recipes import (
    sizes,
)
from dynmoe_jax.surgery.recipes.command import parse
from dynmoe_jax.surgery.recipes.recipe import Asked, planned

ROOT = Path(__file__).parents[3]


ABOUT = '''"""About."""
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.recipes import *; from dynmoe_jax.surgery.recipes import sizes
def get_recipe(size, seed, data):
    train = lambda name, seed: Train(name, sizes.dense(size, seed, data))
    return '''


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ('Recipe((train("a", 0), train("a", 1)))', "two steps that are called 'a'; rename one"),
        ('Recipe((train("a", 0), train("b", 0)))', "steps 'a' and 'b' that do the same"),
        ("None", "returns a NoneType from get_recipe"),
        (
            'Recipe(train("a", 0))',
            "steps of a Recipe must be a tuple, not Train; that of a single",
        ),
        (
            'Recipe((Ensemble("e", train("a", 0)),))',
            "members of the step e must be a tuple",
        ),
        (
            'Recipe((), (Comparison(train("a", 0), train("b", 1), "exct"),))',
            "Comparison of a by 'exct' must be by one of bits, exact",
        ),
        (
            'Recipe((Train("t", train("a", 0)),))',
            "cfg of the step t must be a Config, not Train.",
        ),
        (
            'Recipe((Train("t", sizes.dense(size, seed), "a"),))',
            "start of the step t must be a Step, not str.",
        ),
        (
            'Recipe((Operate("m", Upcycle, (train("a", 0),)),))',
            "must be an Operation, not the class Upcycle; call it: Upcycle().",
        ),
        (
            'Recipe((Evaluate("v", train("a", 0), ("--routing", "--workdir=x")),))',
            "evaluate v: --workdir=x has no effect in a recipe",
        ),
        ("{}['x']", "recipe.py:6 fails: KeyError: 'x'."),
        ("exit(0)", "recipe.py:6 fails: SystemExit: 0."),
        ("Recipe(())", "has no steps"),
        ("Recipe((7,))", "has 7 in the place of a step"),
        ('Recipe((train("a" * 101, 0),))', "100 of them at the most"),
    ],
)
def test_recipe_that_says_two_things_or_nothing_is_refused(tmp_path, recipe, sentence):
    file = tmp_path / "recipe.py"
    file.write_text(ABOUT + recipe)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        planned(Asked(file, tmp_path, "tiny"))


def test_what_is_compared_is_done_though_it_is_not_listed(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(ABOUT + 'Recipe((), (Comparison(train("a", 0), train("b", 1)),))')
    assert [step.name for step in planned(Asked(file, tmp_path, "tiny")).steps.values()] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not there"),
        ("def get_recipe(size, seed, data): pass", "must have a docstring"),
        ('"""About."""\n', "a function get_recipe"),
        ('"""About."""\nimport no_such_module\n', "fails: ModuleNotFoundError: No module named"),
        ('"""About."""\ndef get_recipe(:\n', "recipe.py:2 fails: SyntaxError"),
    ],
)
def test_file_that_is_no_recipe_is_refused(tmp_path, text, sentence):
    file = tmp_path / "recipe.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        planned(Asked(file, tmp_path, "tiny"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--recipe=x.py"], "--workdir is missing"),
        (["--recipe"], "--recipe names no file"),
        (["--recipe=x.py", "--workdir=w", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["--recipe=x.py", "--workdir=w", "--processes=0"], "--processes=0 must be at least 1"),
        (
            ["--recipe=x.py", "--workdir=w", "--stepz=1"],
            "--stepz is no flag of --recipe; did you mean --",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(flags)


def test_help_needs_no_recipe(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--recipe", "--help"])
    assert end.value.code == 0
    assert "--seeds" in capsys.readouterr().out


def test_a_misspelt_file_is_named_beside_its_nearest(tmp_path):
    (tmp_path / "upcycling.py").touch()
    with pytest.raises(ConfigError, match=r"did you mean --recipe=.*upcycling\.py\?"):
        planned(Asked(tmp_path / "upcyling.py", tmp_path, "tiny"))


def test_comparisons_are_the_same_from_all_seeds(tmp_path):
    file = tmp_path / "recipe.py"
    file.write_text(
        '"""One more from the first seed."""\n'
        "from dynmoe_jax.surgery.recipes import Comparison, Recipe, Train, sizes\n"
        "def get_recipe(size, seed, data):\n"
        "    one = Train('a', sizes.dense(size, seed, steps=5))\n"
        "    two = Train('b', sizes.dense(size, seed, steps=6))\n"
        "    return Recipe((one, two), (Comparison(one, two),) * (1 - seed))\n"
    )
    with pytest.raises(ConfigError, match="compares more from one seed than from another"):
        planned(Asked(file, tmp_path, "tiny", seeds=2))


def test_unknown_size_names_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="--size=huge must be one of laptop, tiny"):
        planned(Asked(tmp_path / "recipe.py", tmp_path, "huge"))


def test_the_page_of_recipes_names_every_one_and_what_it_came_to():
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "recipes").glob("*.py"))
    about = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    results = re.findall(r"^\| [^|`]+ \| `(\w+)` \|[^|]+\|[^|]+\|[^|]+\|$", text, re.MULTILINE)
    assert sorted(about) == sorted(results) == [file.stem for file in files]
    for file in files:
        assert "Result (laptop, " in ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_branches_are_those_of_the_domains_that_the_text_has(tmp_path):
    for name in ("law", "chat"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    domains = sizes.domains_of(f"jsonl:{tmp_path}/*.jsonl")
    assert domains == ("chat", "law")
    assert sizes.one_of(domains, "law") == "chat=0,law=1"
    with pytest.raises(ConfigError, match="has 1 domains, and branches need two or more"):
        sizes.domains_of(f"jsonl:{tmp_path}/law.jsonl")
