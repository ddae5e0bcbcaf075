"""From the command line to a checked config; every mistake is one sentence and exit code 2."""

import difflib
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.markup import escape
from rich.table import Table

from dynmoe_jax import config
from dynmoe_jax.console import console

EXIT_BAD_INPUT = 2
DEFAULT_CONFIG = "configs/quickstart.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", DEFAULT_CONFIG, "the run's settings", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "folder of the run; default: runs/ and the name of the config file"
)


def run(
    main: Callable[[config.Config, Path], int],
    about: str,
    bad_input: tuple[type[Exception], ...] = (),
) -> int:
    """Parses ``sys.argv``, calls ``main(config, workdir)`` and returns the exit code.

    Args:
      main: the program.
      about: what ``--help`` says first.
      bad_input: exceptions besides ConfigError whose message is meant for the user.
    """
    try:
        if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in sys.argv[1:]):
            _print_help(about)
            return 0
        cfg, workdir = parse(sys.argv)
        return main(cfg, workdir)
    except (config.ConfigError, *bad_input) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return EXIT_BAD_INPUT


def parse(argv: Sequence[str]) -> tuple[config.Config, Path]:
    """The checked config and the workdir that a command line names.

    Raises:
      ConfigError: an unknown flag or setting, a wrong type, or a value out of range.
    """
    path = _check_file(argv)
    for name, value in _overrides(argv[1:]):
        _check_override(name, value)
    try:
        rest = flags.FLAGS(list(argv))[1:]
    except flags.Error as error:
        raise config.ConfigError(" ".join(str(error).split())) from error
    if rest:
        raise config.ConfigError(f"{rest[0]!r} is not a flag; settings look like --config.NAME=…")
    settings = _CONFIG.value
    workdir = Path(_WORKDIR.value or Path("runs") / path.stem)
    return config.from_config_dict(settings), workdir.expanduser()


def _check_file(argv: Sequence[str]) -> Path:
    """The config file, which must exist."""
    named = [a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))]
    follows = [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
    path = Path([DEFAULT_CONFIG, *follows, *named][-1])
    if path.is_file():
        return path
    near = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), near, n=1, cutoff=0.0)
    hint = (
        f"; did you mean --config={near[0]}?"
        if near
        else "; name a file such as configs/quickstart.py."
    )
    raise config.ConfigError(f"--config={path} is not a file{hint}")


def _overrides(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """(dotted name, text) of every ``--config.NAME=text``; None where no text is given."""
    found = []
    for i, argument in enumerate(arguments):
        name, equals, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        value = text if equals else (None if following.startswith("--") else following)
        found.append((name.removeprefix("config."), value))
    return found


def _check_override(name: str, text: str | None) -> None:
    """Raises ConfigError unless the setting exists and the text reads as its type."""
    fields = {path: field for path, field, _ in config.walk(config.Config())}
    if name not in fields:
        raise config.unknown_setting(name)
    wanted = fields[name].type
    if wanted is bool and (text is None or text.lower() in ("true", "false", "1", "0")):
        return
    try:
        if text is None or wanted is bool:
            raise ValueError
        wanted(text)
    except ValueError:
        help = fields[name].metadata["help"]
        raise config.ConfigError(
            f"config.{name}={text or ''!s} must be of type {wanted.__name__}: {help}."
        ) from None


def _print_help(about: str) -> None:
    console.print(f"{about}\n\n  --config=FILE.py  --workdir=DIR  --config.NAME=VALUE …\n")
    table = Table(title="Settings and their defaults", title_justify="left", box=None)
    for column in ("--config.", "default", "unit", ""):
        table.add_column(column, overflow="fold")
    for path, field, value in config.walk(config.Config()):
        choices = field.metadata["choices"]
        about_it = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        table.add_row(path, repr(value), field.metadata["unit"], escape(about_it))
    console.print(table)
