"""Command line of the main job: flags to a checked config; a mistake is one sentence and exit 2."""

import difflib
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags
from rich.markup import escape
from rich.table import Table

from dynmoe_jax import config
from dynmoe_jax.cluster.rank import Rank, rank_from
from dynmoe_jax.console import console
from dynmoe_jax.hardware.absent_accelerators import leave_out_absent_accelerators
from dynmoe_jax.registry import load_plugin

EXIT_BAD_INPUT = 2
EXIT_BAD_NUMBERS = 3
EXIT_OUT_OF_MEMORY = 4
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 143
"""As of any process that Ctrl-C or SIGTERM ends (128 + the signal's number): whoever starts runs
again need not know whether the run was still preparing, or was training and has saved."""
DEFAULT_CONFIG = "configs/quickstart.py"
CLUSTER_FLAGS = {
    "coordinator": (str, "host and port of process 0, where several processes train one run"),
    "num_processes": (int, "how many they are; 1 alone: look for no others"),
    "process_id": (int, "which of them this is, from 0"),
    "connect_timeout": (
        int,
        f"seconds to wait for the others at the start, {Rank.connect_timeout}",
    ),
    "heartbeat_timeout": (
        int,
        f"seconds of silence after which one counts as dead, {Rank.heartbeat_timeout}",
    ),
}
"""Flags of a cluster: type and help by name.  Where JAX finds the cluster by itself (TPU, SLURM,
Open MPI 4), none is needed; where Open MPI 5 starts the processes, only the first."""


def run(
    main: Callable[[config.Config, Path], int],
    about: str,
    bad_input: tuple[type[Exception], ...] = (),
) -> int:
    """Parses ``sys.argv``, calls ``main(config, workdir)`` and returns the exit code.

    Args:
      main: the program.
      about: what ``--help`` says first.
      bad_input: exceptions besides ConfigError whose message is meant for the user; the exit code
        is their ``exit_code``, if they have one.
    """

    def program() -> int:
        if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in sys.argv[1:]):
            _print_help(about)
            return 0
        rank, argv = parse_rank(sys.argv)
        cfg, workdir = parse(argv)
        # Not before: JAX is slow to load (docs/measurements.md: start-jax), and mistakes are found
        # without it.
        from dynmoe_jax.cluster.joining import joined

        with joined(rank, exits):
            return main(cfg, workdir)

    exits: list[Callable[[int], None]] = []
    try:
        code = exit_code(program, bad_input)
    except BaseException:
        if not exits:
            raise
        traceback.print_exc()
        code = 1
    for leave in exits:
        leave(code)
    return code


def exit_code(program: Callable[[], int], bad_input: tuple[type[Exception], ...] = ()) -> int:
    """Runs a program; what a user can repair is one sentence, not a traceback.

    Args:
      program: returns its exit code.
      bad_input: as in :func:`run`.
    """
    leave_out_absent_accelerators()
    _write_whatever_comes()
    try:
        # Before anything asks for settings: their tree has what the files register.
        sys.argv[1:] = load_plugins(sys.argv[1:])
        return program()
    except (config.ConfigError, *bad_input) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return getattr(error, "exit_code", EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        console.print("Interrupted; the same command goes on from what is on disk.")
        return EXIT_INTERRUPTED


def _write_whatever_comes() -> None:
    """Lets a terminal be written what it has no letter for, such as a name that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def parse_rank(argv: Sequence[str]) -> tuple[Rank, list[str]]:
    """This process among others, as flags and Open MPI say, and the other arguments.

    Raises:
      ConfigError: a number is none, or the flags contradict each other.
    """
    found, rest, unread = {}, [argv[0]], iter(argv[1:])
    for argument in unread:
        name, equals, value = argument.partition("=")
        name = name.removeprefix("--")
        if not argument.startswith("--") or name not in CLUSTER_FLAGS:
            rest.append(argument)
            continue
        value = value if equals else next(unread, "")
        kind, about = CLUSTER_FLAGS[name]
        try:
            found[name] = kind(value)
        except ValueError:
            raise config.ConfigError(f"--{name}={value} must be a whole number: {about}.") from None
    return rank_from(found, os.environ), rest


def parse(argv: Sequence[str]) -> tuple[config.Config, Path]:
    """The checked config and the workdir that a command line names.

    Raises:
      ConfigError: an unknown flag or setting, a wrong type, or a value out of range.
    """
    path, rest = _config_file(argv[1:])
    for name, value in _overrides(rest):
        _check_override(name, value)
    rest = _without_auto(rest)
    # The file first: its settings are there before any of them is overridden.
    argv = [argv[0], f"--config={path}", *rest]
    # Flags of this call's own: libraries that were imported may have defined theirs globally.
    values = flags.FlagValues()
    workdir = flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
    try:
        settings = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        unread = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname) from error
    except flags.Error as error:
        if "whilst parsing" in str(error) and error.__context__:  # of what the file did
            raise failed_file("config", path, error.__context__) from error
        raise config.ConfigError(" ".join(str(error).split())) from error
    except config.ConfigError:
        raise
    except Exception as error:  # a config file is a program, which may do anything
        raise failed_file("config", path, error) from error
    if unread:
        raise config.ConfigError(f"{unread[0]!r} is not a flag; settings look like --config.NAME=…")
    if not isinstance(settings.value, ml_collections.ConfigDict):
        raise config.ConfigError(
            f"get_config() of --config={path} returns a {type(settings.value).__name__}; "
            "it must return config.to_config_dict(…)."
        )
    folder = Path(workdir.value or Path("runs") / path.stem)
    return config.from_config_dict(settings.value), folder.expanduser()


def _config_file(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The config file that is named last, or the default, and the other arguments."""
    path, rest, unread = Path(DEFAULT_CONFIG), [], iter(arguments)
    for argument in unread:
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            path = Path(value if equals else next(unread, ""))
        else:
            rest.append(argument)
    _check_file(path)
    return path, rest


def _check_file(path: Path) -> None:
    """Raises ConfigError unless the path is that of a config file."""
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), near, n=1, cutoff=0.6)
        if not near and not Path(DEFAULT_CONFIG).is_file():
            raise config.ConfigError(
                f"--config={path} is not a file; start the command in the project's folder, or "
                "name a config file by its path."
            )
        meant = (near or [DEFAULT_CONFIG])[0]
        raise config.ConfigError(f"--config={path} is not a file; did you mean --config={meant}?")
    if b"get_config" not in path.read_bytes():
        raise config.ConfigError(
            f"--config={path} defines no get_config(); start from a copy of {DEFAULT_CONFIG}."
        )


def failed_file(flag: str, path: Path, error: BaseException) -> config.ConfigError:
    """The error for a file whose program fails, with the line in it.

    Args:
      flag: that names the file.
      path: of the file.
      error: of its program.
    """
    line = getattr(error, "lineno", None)  # of a SyntaxError
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve() == path.resolve():
            line = frame.lineno
    where = f"{path}:{line}" if line else str(path)
    message = " ".join(str(error).split())
    return config.ConfigError(f"--{flag}={where} fails: {type(error).__name__}: {message}.")


def _unknown_flag(name: str) -> config.ConfigError:
    known = ("config", "workdir", "plugin", "help", *CLUSTER_FLAGS)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near[0] if near else f"config.{config.nearest_name(name)}"
    return config.ConfigError(f"--{name} is not a flag; did you mean --{near}?")


def _overrides(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """(dotted name, text) of every ``--config.NAME=text``; None where no text is given."""
    found = []
    for i, argument in enumerate(arguments):
        name, equals, text = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not name.startswith(("config.", "noconfig.")):
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        missing = following.startswith("--") or name.startswith("no")
        value = text if equals else (None if missing else following)
        found.append((name.removeprefix("no").removeprefix("config."), value))
    return found


def _check_override(name: str, text: str | None) -> None:
    """Raises ConfigError unless the setting exists and the text reads as its type."""
    fields = {path: field for path, field, _ in config.walk(config.Config())}
    if name not in fields:
        raise config.unknown_setting(name)
    wanted = fields[name].type
    if fields[name].metadata["auto"] and text == "auto":
        return
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


def free_settings(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(values by name of every ``--config.NAME=VALUE``, the other arguments).

    Raises:
      ConfigError: a value is missing.
    """
    found, rest = {}, []
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name.startswith("--config."):
            rest.append(argument)
            continue
        if not equals:
            raise config.ConfigError(f"{name} needs a value; write {name}=VALUE.")
        found[name.removeprefix("--config.")] = text
    return found, rest


def _without_auto(arguments: Sequence[str]) -> list[str]:
    """The arguments with the number that stands for ``auto`` in ``--config.NAME=auto``."""
    settings = config.walk(config.Config())
    auto = {f"config.{path}" for path, field, _ in settings if field.metadata["auto"]}
    found = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        name, equals, text = argument.partition("=")
        if equals and text == "auto" and name.lstrip("-") in auto:
            argument = f"{name}={config.AUTO}"
        elif argument == "auto" and before.lstrip("-") in auto:
            argument = f"{config.AUTO}"
        found.append(argument)
    return found


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """Runs the files that ``--plugin=FILE`` names, and returns the other arguments.

    Raises:
      ConfigError: one is no Python file, or fails.
    """
    rest, unread = [], iter(arguments)
    for argument in unread:
        name, equals, path = argument.partition("=")
        if name == "--plugin":
            load_plugin(path if equals else next(unread, ""))
        else:
            rest.append(argument)
    return rest


def _print_help(about: str) -> None:
    console.print(
        f"{about}\n\n  --config=FILE.py  --workdir=DIR  --config.NAME=VALUE …\n"
        "  --plugin=FILE.py registers routers, losses and other kinds of your own\n"
    )
    table = Table(title="Several processes (docs/clusters.md)", title_justify="left", box=None)
    table.show_header = False
    for name, (_, about_it) in CLUSTER_FLAGS.items():
        table.add_row(f"--{name}", about_it)
    console.print(table, "")
    table = Table(title="Settings and their defaults", title_justify="left", box=None)
    for column in ("--config.", "default", "unit", ""):
        table.add_column(column, overflow="fold")
    group, defaults = "", config.Config()
    for path, field, value in config.walk(defaults):
        if (owner := path.rpartition(".")[0]) != group:
            group = owner
            settings = functools.reduce(getattr, filter(None, owner.split(".")), defaults)
            table.add_row()
            about_it = f"[bold]{escape((type(settings).__doc__ or '').splitlines()[0])}[/]"
            table.add_row(f"[bold]{owner}[/]", "", "", about_it)
        choices = field.metadata["choices"]
        about_it = field.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        default = repr(config.shown(field, value))
        table.add_row(path, default, field.metadata["unit"], escape(about_it))
    console.print(table)


def plugin_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments that name plug-ins, which workers load too."""
    found, unread = [], iter(arguments)
    for argument in unread:
        name, equals, path = argument.partition("=")
        if name == "--plugin":
            found.append(f"--plugin={path if equals else next(unread, '')}")
    return found
