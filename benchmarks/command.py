"""What all benchmarks have in common as commands: what is missing is said in one sentence."""

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from packaging.requirements import Requirement

from benchmarks.worker import WorkerError
from dynmoe_jax.command_line import exit_code
from dynmoe_jax.config import ConfigError

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def run(program: Callable[[], object]) -> NoReturn:
    """Runs a benchmark and leaves with its exit code, if it returns one.

    Args:
      program: what it does.
    """

    def found() -> int:
        returned = program()
        return returned if isinstance(returned, int) else 0

    sys.exit(exit_code(found, (WorkerError,)))


def missing(extra: str) -> list[str]:
    """What is not installed of an extra, or not in the version that it asks for."""
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    wanted = map(Requirement, project["optional-dependencies"][extra])
    return [requirement.name for requirement in wanted if not _is_installed(requirement)]


def need(*extras: str) -> None:
    """Raises ConfigError unless all that these extras bring is installed."""
    absent = dict.fromkeys(name for extra in extras for name in missing(extra))
    if absent:
        raise ConfigError(
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing for this "
            f"benchmark; pip install -e '.[{','.join(extras)}]'."
        )


def _is_installed(requirement: Requirement) -> bool:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)
