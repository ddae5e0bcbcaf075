"""Command line of recipes: ``python -m dynmoe_jax.surgery --recipe=FILE --workdir=DIR``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dynmoe_jax.fields import ConfigError, nearest
from dynmoe_jax.surgery.recipes.recipe import Asked
from dynmoe_jax.surgery.recipes.sizes import SIZES

FLAG = "--recipe"

_TEXT = "text, as config.data.sources (default: the recipe's, mostly the Python installation)"
_ABOUT = """Does the steps of a recipe: operations, trainings, evaluations, exports.

    python -m dynmoe_jax.surgery --recipe=recipes/upcycling.py --workdir=runs/upcycling --plan
    python -m dynmoe_jax.surgery --recipe=recipes/upcycling.py --workdir=runs/upcycling --seeds=3

Writes DIR/recipe.html and recipe.json; every step has a folder in DIR/steps, which other commands
take as --workdir or --from.  Stopped at any moment, the same command continues.  A step is done
again if something that it depends on has changed.  --plugin=FILE makes operations, routers and
kinds of steps of your own known.

docs/recipes.md lists the recipes that are there, and says how to write one."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see {FLAG} --help.")


def is_of_recipe(argv: Sequence[str]) -> bool:
    """Whether a command line of surgery asks for a recipe."""
    return any(word.partition("=")[0] == FLAG for word in argv)


def parse(argv: Sequence[str]) -> tuple[Asked, bool]:
    """Reads a command line.

    Returns:
      (what is asked for, whether nothing but the plan is).

    Raises:
      ConfigError: a flag is unknown, or its value cannot be.
    """
    parser = _Parser(
        prog="python -m dynmoe_jax.surgery",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    # Without a file, --help is not taken for one.
    add(FLAG, type=_path, nargs="?", required=True, metavar="FILE", help="of the recipe")
    add("--workdir", type=_path, help="folder of everything that is made; not needed by --plan")
    add("--size", default=Asked.size, help=f"one of {', '.join(SIZES)} (default: %(default)s)")
    often = "how often all of it is done (default: %(default)s)"
    add("--seeds", type=int, default=Asked.seeds, help=often)
    add("--data", default=Asked.sources, metavar="SOURCES", help=_TEXT)
    beside = "steps side by side (default: %(default)s)"
    add("--processes", type=int, default=Asked.processes, metavar="N", help=beside)
    add("--plan", action="store_true", help="say which steps there are and what they cost")
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [each for action in parser._actions for each in action.option_strings]
        raise ConfigError(f"{name} is no flag of {FLAG}; did you mean {nearest(name, known)}?")
    for name in ("seeds", "processes"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.recipe is None:
        raise ConfigError(f"{FLAG} names no file; name one, as in recipes/.")
    if flags.workdir is None and not flags.plan:
        raise ConfigError("--workdir is missing; name the folder of everything that is made.")
    asked = Asked(flags.recipe, flags.workdir, flags.size, flags.seeds, flags.data, flags.processes)
    return asked, flags.plan


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))
