"""Recipe: the steps of one system and what is compared, read from a Python file."""

import dataclasses
import inspect
import math
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.data.sources.registry import check_sources
from dynmoe_jax.surgery.recipes.sizes import SIZES
from dynmoe_jax.surgery.recipes.step import Step

MAKER = "get_recipe"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A question that a recipe answers: is one model better than another one?

    Attributes:
      model: the step of the one.
      than: the step of the other.
    """

    model: Step
    than: Step


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Steps of one seed.

    Attributes:
      steps: all of them, in the order in which people should read of them.
      compared: what the page compares, over seeds.
    """

    steps: tuple[Step, ...]
    compared: tuple[Comparison, ...] = ()


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
            if step.key in _closure(recipe.steps)
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
    recipes = tuple(maker(asked.size, seed, asked.sources) for seed in range(asked.seeds))
    steps = _closure(step for recipe in recipes for step in recipe.steps)
    _check(asked.file, steps.values())
    return Plan(about.splitlines()[0].rstrip("."), about, recipes, steps)


def _read(file: Path) -> tuple[Maker, str]:
    """The function that makes the recipe, and the file's docstring."""
    if not file.is_file():
        raise config.ConfigError(f"--recipe={file} is not there; name a file, as in recipes/.")
    try:
        found = runpy.run_path(str(file))
    except (SyntaxError, ImportError, NameError, TypeError, AttributeError) as error:
        raise config.ConfigError(f"--recipe={file} cannot be read: {error}.") from error
    maker, about = found.get(MAKER), inspect.cleandoc(found.get("__doc__") or "")
    if not callable(maker) or not about:
        raise config.ConfigError(
            f"--recipe={file} must have a docstring and a function {MAKER}(size, seed, data); see "
            "the files in recipes/."
        )
    return maker, about


def _closure(steps: Iterable[Step]) -> dict[str, Step]:
    """Steps and all that they need, by key, each behind its own needs."""
    found: dict[str, Step] = {}
    for step in steps:
        found |= {key: each for key, each in _closure(step.needs).items() if key not in found}
        found.setdefault(step.key, step)
    return found


def _check(file: Path, steps: Sequence[Step]) -> None:
    """Raises ConfigError for steps that cannot be done, before anything is read."""
    for step in steps:
        if not step.name.replace("_", "").replace("-", "").isalnum():
            raise config.ConfigError(
                f"--recipe={file} has a step {step.name!r}; a name has letters, digits, _ and -."
            )
        price = step.price()
        assert math.isfinite(price.seconds), step.name
