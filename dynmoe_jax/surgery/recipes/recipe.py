"""Recipe: the steps of one system and what is compared, read from a Python file."""

import contextlib
import dataclasses
import difflib
import inspect
import math
import runpy
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.command_line import failed_file
from dynmoe_jax.data import DataError
from dynmoe_jax.data.sources.registry import check_sources
from dynmoe_jax.surgery.recipes.sizes import SIZES
from dynmoe_jax.surgery.recipes.step import Step, check_types

MAKER = "get_recipe"
COMPARED = BITS, EXACT = "bits", "exact"
"""What models are compared by."""

_LONGEST_NAME = 100
"""Characters of a step's name, of which file systems take 255 bytes."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A question that a recipe answers: is one model better than another one?

    Attributes:
      model: the step of the one.
      than: the step of the other.
      by: what is compared: held-out bits per byte (:data:`BITS`), or the share of responses that an
        evaluation of instructions found matched exactly (:data:`EXACT`).
    """

    model: Step
    than: Step
    by: str = BITS

    def __post_init__(self) -> None:
        """Refuses what nobody can compare by."""
        if self.by not in COMPARED:
            raise config.ConfigError(
                f"Comparison of {self.model.name} by {self.by!r} must be by one of "
                f"{', '.join(COMPARED)}."
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps of one seed.

    Attributes:
      steps: all of them, in the order in which people should read of them.
      compared: what the page compares, over seeds.
    """

    steps: tuple[Step, ...]
    compared: tuple[Comparison, ...] = ()

    def __post_init__(self) -> None:
        """Checks that both are tuples."""
        check_types(self, "a Recipe")

    @property
    def every_step(self) -> tuple[Step, ...]:
        """Its steps, and those that are compared though nobody named them."""
        compared = (step for each in self.compared for step in (each.model, each.than))
        return (*self.steps, *compared)


Maker = Callable[[str, int, str], Recipe]
"""(size, seed, sources of text that the user named, or nothing) -> recipe."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A recipe as the command line asks for it.

    Attributes:
      file: of the recipe.
      workdir: folder of everything that is made.
      size: a name of :data:`.sizes.SIZES`.
      seeds: how often all of it is done.
      sources: of text; empty: the recipe's own.
      processes: steps side by side.
    """

    file: Path
    workdir: Path
    size: str = "laptop"
    seeds: int = 1
    sources: str = ""
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of a recipe, those of all seeds, each after what it needs.

    Attributes:
      title: first line of the file's docstring.
      about: the docstring.
      recipes: one for each seed.
      steps: by key.
    """

    title: str
    about: str
    recipes: tuple[Recipe, ...]
    steps: dict[str, Step]

    def seed_of(self, step: Step) -> str:
        """Seeds that a step belongs to, for people."""
        if len(self.recipes) == 1:
            return ""
        seeds = [
            str(seed)
            for seed, recipe in enumerate(self.recipes)
            if step.key in _closure(recipe.every_step)
        ]
        return ", ".join(seeds)

    def ancestors(self, step: Step) -> dict[str, Step]:
        """All steps that a step needs, by key, itself among them."""
        return _closure([step])

    def flops(self, step: Step) -> float:
        """FLOPs of all training that a step needs, its own among them, each counted once."""
        return sum(each.price().flops for each in self.ancestors(step).values())


def planned(asked: Asked) -> Plan:
    """Reads a recipe, and finds out its steps.

    Raises:
      ConfigError: the file cannot be read, is no recipe, or a step of it cannot be.
    """
    if asked.size not in SIZES:
        raise config.ConfigError(f"--size={asked.size} must be one of {', '.join(SIZES)}.")
    maker, about = _read(asked.file)
    if asked.sources:
        check_sources(config.Data(sources=asked.sources))
    with _failures_of(asked.file):
        recipes = tuple(maker(asked.size, seed, asked.sources) for seed in range(asked.seeds))
        for recipe in recipes:
            _check_recipe(asked.file, recipe)
        steps = _closure(step for recipe in recipes for step in recipe.every_step)
    if len({len(recipe.compared) for recipe in recipes}) > 1:
        raise config.ConfigError(
            f"--recipe={asked.file} compares more from one seed than from another; give the same "
            "comparisons for all."
        )
    _check_names(asked.file, recipes)
    _check(asked.file, steps.values())
    return Plan(about.splitlines()[0].rstrip("."), about, recipes, steps)


def _read(file: Path) -> tuple[Maker, str]:
    """The function that makes the recipe, and the file's docstring."""
    if not file.is_file():
        near = [str(path) for path in sorted(file.parent.glob("*.py"))]
        meant = difflib.get_close_matches(str(file), near, n=1)
        remedy = f"did you mean --recipe={meant[0]}?" if meant else "name a file, as in recipes/."
        what = "is a folder" if file.is_dir() else "is not there"
        raise config.ConfigError(f"--recipe={file} {what}; {remedy}")
    with _failures_of(file):
        found = runpy.run_path(str(file))
    maker, about = found.get(MAKER), inspect.cleandoc(found.get("__doc__") or "")
    if not callable(maker) or not about:
        raise config.ConfigError(
            f"--recipe={file} must have a docstring and a function {MAKER}(size, seed, data); see "
            "the files in recipes/."
        )
    return maker, about


@contextlib.contextmanager
def _failures_of(file: Path) -> Iterator[None]:
    """Turns whatever a recipe's program does wrong into a ConfigError."""
    try:
        yield
    except (config.ConfigError, DataError):
        raise
    except (Exception, SystemExit) as error:  # a recipe is a program, which may do anything
        raise failed_file("recipe", file, error) from error


def _closure(steps: Iterable[Step]) -> dict[str, Step]:
    """Steps and all that they need, by key, each behind its own needs."""
    found: dict[str, Step] = {}
    for step in _all(steps):
        found.setdefault(step.key, step)
    return found


def _all(steps: Iterable[Step]) -> list[Step]:
    """Steps and all that they need, each behind its own needs, those that are alike too."""
    found: dict[int, Step] = {}

    def add(step: Step) -> None:
        if id(step) not in found:
            for need in step.needs:
                add(need)
            found[id(step)] = step

    for step in steps:
        add(step)
    return list(found.values())


def _check_recipe(file: Path, recipe: Recipe) -> None:
    """Raises ConfigError for what is no recipe."""
    if not isinstance(recipe, Recipe):
        raise config.ConfigError(
            f"--recipe={file} returns a {type(recipe).__name__} from {MAKER}; return a Recipe, as "
            "the files in recipes/ do."
        )
    if others := [step for step in recipe.every_step if not isinstance(step, Step)]:
        raise config.ConfigError(
            f"--recipe={file} has {others[0]!r} in the place of a step; give a Train, an Operate "
            "or another kind of step."
        )
    if not recipe.every_step:
        raise config.ConfigError(f"--recipe={file} has no steps; name those to be done.")


def _check_names(file: Path, recipes: Sequence[Recipe]) -> None:
    """Raises ConfigError unless steps of one name are one step, and have no other name besides."""
    names: dict[str, str] = {}
    for recipe in recipes:
        keys: dict[str, str] = {}
        for step in _all(recipe.every_step):
            if keys.setdefault(step.name, step.key) != step.key:
                raise config.ConfigError(
                    f"--recipe={file} has two steps that are called {step.name!r}; rename one."
                )
            if (name := names.setdefault(step.key, step.name)) != step.name:
                raise config.ConfigError(
                    f"--recipe={file} has steps {name!r} and {step.name!r} that do the same; keep "
                    "one of them."
                )


def _check(file: Path, steps: Sequence[Step]) -> None:
    """Raises ConfigError for steps that cannot be done, before anything is read."""
    for step in steps:
        name = str(step.name)
        if len(name) > _LONGEST_NAME or not name.replace("_", "").replace("-", "").isalnum():
            raise config.ConfigError(
                f"--recipe={file} has a step {step.name!r}; a name has letters, digits, _ and -, "
                f"{_LONGEST_NAME} of them at the most."
            )
        try:
            price = step.price()
        except config.ConfigError as error:
            raise config.ConfigError(f"{step.kind} {step.name}: {error}") from error
        assert math.isfinite(price.seconds), step.name
