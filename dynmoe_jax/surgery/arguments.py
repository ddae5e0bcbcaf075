"""Command line of surgery, derived from the settings of the operations."""

import argparse
import dataclasses
import difflib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dynmoe_jax.fields import ConfigError, check_value, from_text, idle_settings, shown
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.request import Options, Request

LIST, REBUILD = "list", "rebuild"

_ABOUT = """Makes another model of one or of several.

    python -m dynmoe_jax.surgery list
    python -m dynmoe_jax.surgery upcycle --from=runs/dense --to=runs/moe --num_experts=8 --plan
    python -m dynmoe_jax.surgery upcycle --from=model.gguf --to=runs/moe --data=python
    python -m dynmoe_jax.surgery rebuild --from=runs/moe --to=runs/again
    python -m dynmoe_jax.surgery --recipe=recipes/upcycling.py --workdir=runs/upcycling

A model is a run's folder, a folder in Hugging Face's format, or a GGUF file.  The result is a run's
folder: train on with --config.train.init_from=FOLDER, generate, evaluate, export."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{message}; see --help.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line.

    Returns:
      ``command``; with an operation ``asked`` (:class:`Request`) and ``plan``; to build again
      ``source`` and ``to``.

    Raises:
      ConfigError: a flag is unknown, or its value cannot be.
    """
    parser = _parser()
    _check_names(parser, argv)
    flags = parser.parse_args(argv)
    if flags.command in OPERATIONS:
        operation = _built(OPERATIONS[flags.command], flags)
        flags.asked = Request(operation, tuple(flags.source), flags.to, _built(Options, flags))
    return flags


def _check_names(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Raises ConfigError for an operation, or a flag of one, that does not exist."""
    (commands,) = (each for each in parser._actions if isinstance(each.choices, dict))
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is None:
        return
    if command not in commands.choices:
        near = difflib.get_close_matches(command, commands.choices, 1, 0.0)[0]
        raise ConfigError(f"{command!r} is no operation; did you mean {near}?")
    known = [f for each in commands.choices[command]._actions for f in each.option_strings]
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise ConfigError(f"{name} is no flag of {command}; did you mean {near}?")


def _path(text: str) -> Path:
    """A path as people write it; unlike Path's, this leaves a home alone that is not there."""
    return Path(os.path.expanduser(text))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dynmoe_jax.surgery",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="OPERATION")
    commands.add_parser(LIST, help="all operations, in a table", allow_abbrev=False)
    again = commands.add_parser(
        REBUILD, help="makes a result again from its parents", allow_abbrev=False
    )
    again.add_argument("--from", dest="source", type=_path, required=True, help="the result")
    again.add_argument("--to", type=_path, required=True, help="a folder that is not there yet")
    for name, kind in OPERATIONS.items():
        _add_operation(commands, name, kind)
    return parser


def _add_operation(commands: Any, name: str, kind: type) -> None:
    about = inspect.getdoc(kind)
    added = commands.add_parser(
        name,
        help=about.splitlines()[0],
        description=f"{about}\n\n{kind.paper}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    added.add_argument(
        "--from",
        dest="source",
        type=_path,
        action="append",
        required=True,
        metavar="MODEL",
        help="a run's folder, a folder in Hugging Face's format, or a .gguf file"
        + ("; once for each model" if kind.parents[1] != 1 else ""),
    )
    added.add_argument("--to", type=_path, required=True, help="folder of the result")
    added.add_argument(
        "--plan", action="store_true", help="say what it will be and cost, and do nothing"
    )
    for group, settings in ((f"settings of {name}", kind), ("settings of all operations", Options)):
        flags = added.add_argument_group(group)
        for field in dataclasses.fields(settings):
            bare = {"nargs": "?", "const": "true"} if field.type is bool else {}
            flags.add_argument(
                f"--{field.name}", metavar=_metavar(field), help=_help(field), **bare
            )


def _metavar(field: dataclasses.Field) -> str:
    return "|".join(field.metadata["choices"]) or {bool: "true|false"}.get(field.type, "VALUE")


def _help(field: dataclasses.Field) -> str:
    default = str(shown(field, field.default))
    default = default.lower() if field.type is bool else default
    unit = f" {field.metadata['unit']}" if field.metadata["unit"] else ""
    told = f" (default: {default}{unit})" if default else ""
    return (field.metadata["help"] + told).replace("%", "%%")


def _built(kind: type, flags: argparse.Namespace) -> Any:
    """The settings that the flags name, checked."""
    values = {}
    for field in dataclasses.fields(kind):
        text = getattr(flags, field.name)
        if text is not None:
            value = from_text(field, text)
            check_value(field.name, field, value, prefix="--")
            values[field.name] = value
    built = kind(**values)
    for name, other in idle_settings(kind, vars(built)).items():
        if name in values:
            raise ConfigError(
                f"--{name}={values[name]} has no effect with --{other}={getattr(built, other)}; "
                "leave it out."
            )
    return built
