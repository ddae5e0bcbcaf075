"""Trains the comparison of "Harder Tasks Need More Experts" and says what holds.

    python -m dynmoe_jax.study --size=laptop --workdir=runs/study
    python -m dynmoe_jax.study --size=laptop --workdir=runs/study --questions=3 --seeds=1
    python -m dynmoe_jax.study --size=laptop --workdir=runs/mine --data='jsonl:corpus/*.jsonl.zst'

Writes WORKDIR/study.html and study.json; every run is an ordinary run's folder in WORKDIR/runs.
Ctrl-C saves and stops; the same command continues.  Sizes:

"""

import argparse
import sys
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.command_line import exit_code, plugin_arguments
from dynmoe_jax.console import console
from dynmoe_jax.data import DataError, check_sources
from dynmoe_jax.runs.disk import DiskError
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.study.comparison.asked import Asked
from dynmoe_jax.study.comparison.models import MODELS
from dynmoe_jax.study.comparison.plan import Request
from dynmoe_jax.study.comparison.sizes import SIZES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    sizes = "\n".join(f"  {name:<8}{size.about}" for name, size in SIZES.items())
    made = argparse.ArgumentParser(
        prog="python -m dynmoe_jax.study",
        description=__doc__ + sizes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    compared = [name for name, model in MODELS.items() if not model.ablation]
    add("--size", default="laptop", metavar="NAME", help=f"one of {', '.join(SIZES)}")
    add("--workdir", type=Path, default=Path("runs/study"), help="folder of the study")
    add("--seeds", type=int, help="runs of each model; by default as the size is meant")
    add(
        "--models",
        default="",
        help=f"some of {', '.join(compared)}; by default those that the questions compare",
    )
    add(
        "--questions",
        default=",".join(map(str, Asked)),
        help="numbers of those to answer: " + ", ".join(each.words for each in Asked),
    )
    add("--data", default="", metavar="SOURCES", help="text, as config.data.sources")
    add("--items", type=Path, metavar="FOLDER", help="items, as evaluation --data_dir reads them")
    add(
        "--learning_rates",
        default="",
        metavar="RATE,…",
        help="a grid, of which each model takes the rate of the lowest held-out loss (seed 0)",
    )
    add("--processes", type=int, metavar="N", help="runs side by side; by default one, of tiny two")
    add("--yes", action="store_true", help="begin a study that takes a cluster")
    return made


def request_of(asked: argparse.Namespace) -> Request:
    """The request of a command line.

    Raises:
      ConfigError: a value cannot be.
    """
    if asked.size not in SIZES:
        raise config.ConfigError(f"--size={asked.size} must be one of {', '.join(SIZES)}.")
    for name in ("seeds", "processes"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise config.ConfigError(f"--{name}={value} must be at least 1.")
    compared = [name for name, model in MODELS.items() if not model.ablation]
    models = _named(asked.models)
    for name in models:
        if name not in compared:
            raise config.ConfigError(f"--models={name} must be some of {', '.join(compared)}.")
    questions = tuple(_number(text, "questions", int) for text in _named(asked.questions))
    questions = questions or tuple(Asked)
    for number in questions:
        if number not in tuple(Asked):
            raise config.ConfigError(
                f"--questions={number} must be some of {', '.join(map(str, Asked))}."
            )
    rates = tuple(_number(text, "learning_rates", float) for text in _named(asked.learning_rates))
    for rate in rates:
        if not rate > 0:
            raise config.ConfigError(f"--learning_rates={rate:g} must be above 0.")
    if not models:
        from dynmoe_jax.study.questions import QUESTIONS

        wanted = {name for number in questions for name in QUESTIONS[number].models}
        models = tuple(name for name in compared if name in wanted)
    if asked.data:
        check_sources(config.Data(sources=asked.data))
    if asked.items and not asked.items.expanduser().is_dir():
        raise config.ConfigError(f"--items={asked.items} is no folder.")
    return Request(
        asked.size,
        asked.workdir.expanduser(),
        asked.seeds or SIZES[asked.size].seeds,
        models,
        questions,
        asked.data,
        asked.items and asked.items.expanduser(),
        rates,
        asked.processes or SIZES[asked.size].processes,
    )


def _named(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _number(text: str, flag: str, kind: type):
    try:
        return kind(text)
    except ValueError:
        raise config.ConfigError(f"--{flag}={text} must be numbers with commas between.") from None


def main() -> int:
    """Returns the exit code."""
    plugins = plugin_arguments(sys.argv[1:])

    def program() -> int:
        asked = parser().parse_args()
        request = request_of(asked)
        if request.of_size.ask and not asked.yes:
            from dynmoe_jax.study.comparison.price import print_price

            print_price(request)
            console.print("This takes a cluster; give --yes to begin.")
            return 0
        from dynmoe_jax.study.study import study

        return study(request, plugins)

    return exit_code(program, (DataError, CheckpointError, DiskError))


if __name__ == "__main__":
    sys.exit(main())
