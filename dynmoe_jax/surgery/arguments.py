"""Command line of surgery, derived from the settings of the operations."""

import argparse
import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dynmoe_jax.fields import ConfigError, check_value, from_text
from dynmoe_jax.surgery.operation import OPERATIONS
from dynmoe_jax.surgery.request import Options, Request

LIST, REBUILD = "list", "rebuild"

_ABOUT = """Makes another model of one or of several.

    python -m dynmoe_jax.surgery list
    python -m dynmoe_jax.surgery upcycle --from=runs/dense --to=runs/moe --num_experts=8 --plan
    python -m dynmoe_jax.surgery upcycle --from=model.gguf --to=runs/moe --data=python
    python -m dynmoe_jax.surgery rebuild --from=runs/moe --to=runs/again

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
    flags = _parser().parse_args(argv)
    if flags.command in OPERATIONS:
        operation = _built(OPERATIONS[flags.command], flags)
        parents = tuple(Path(folder).expanduser() for folder in flags.source)
        flags.asked = Request(operation, parents, flags.to.expanduser(), _built(Options, flags))
    return flags


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
    again.add_argument("--from", dest="source", type=Path, required=True, help="the result")
    again.add_argument("--to", type=Path, required=True, help="a folder that is not there yet")
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
        action="append",
        required=True,
        metavar="MODEL",
        help="a run's folder, a folder in Hugging Face's format, or a .gguf file"
        + ("; once for each model" if kind.parents[1] != 1 else ""),
    )
    added.add_argument("--to", type=Path, required=True, help="folder of the result")
    added.add_argument(
        "--plan", action="store_true", help="say what it will be and cost, and do nothing"
    )
    for group, settings in ((f"settings of {name}", kind), ("settings of all operations", Options)):
        flags = added.add_argument_group(group)
        for field in dataclasses.fields(settings):
            flags.add_argument(f"--{field.name}", metavar=_metavar(field), help=_help(field))


def _metavar(field: dataclasses.Field) -> str:
    return "|".join(field.metadata["choices"]) or {bool: "true|false"}.get(field.type, "VALUE")


def _help(field: dataclasses.Field) -> str:
    default = str(field.default).lower() if field.type is bool else str(field.default)
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
    return kind(**values)
