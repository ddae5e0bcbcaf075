"""Flags of an ensemble's evaluation, among those of the command."""

import argparse
from collections.abc import Callable
from typing import Any

from dynmoe_jax.config import ConfigError
from dynmoe_jax.evaluation.ensemble.command import Asked
from dynmoe_jax.inference.ensemble.members import FLAG, UNIFORM, folders_of

FOLDER = "evaluation"
"""Folder of results, in that of a run; of an ensemble in that of its first run."""

_DEFAULTS = {"ensemble_text": "", "prior": UNIFORM, "ensemble_top_k": 0}
_OTHERS = ("workdir", "tasks", "perplexity", "instructions", "routing")
"""Flags that ask for evaluations of one model."""


def add_flags(add: Callable[..., Any]) -> None:
    """Adds the flags to a parser; ``add`` is its ``add_argument``."""
    add(
        FLAG,
        default="",
        metavar="RUN,RUN",
        help="in place of --workdir: weigh the runs' models token by token, by what the text so "
        "far says (Branch-Train-Merge)",
    )
    add(
        "--ensemble_text",
        default=_DEFAULTS["ensemble_text"],
        metavar="SOURCES",
        help="text for the ensemble, as config.data.sources; the held-out text of its first run by "
        "default",
    )
    add(
        "--prior",
        default=_DEFAULTS["prior"],
        metavar="PRIOR",
        help="of the ensemble's members: uniform; estimate, by domain, from text that is then not "
        "evaluated; or an ensemble.json (default: %(default)s)",
    )
    add(
        "--ensemble_top_k",
        type=int,
        default=_DEFAULTS["ensemble_top_k"],
        metavar="K",
        help="members with weight at each token; 0: all",
    )


def ensemble_of(flags: argparse.Namespace) -> Asked:
    """The evaluation that a command line with ``--ensemble`` asks for.

    Raises:
      ConfigError: the flag names no two runs, or another evaluation is asked for besides.
    """
    for name in _OTHERS:
        if getattr(flags, name):
            raise ConfigError(f"{FLAG} does not go with --{name}; leave that out.")
    members = folders_of(flags.ensemble)
    return Asked(
        members,
        flags.prior,
        flags.ensemble_top_k,
        flags.ensemble_text,
        flags.limit,
        flags.window,
        flags.output or members[0] / FOLDER,
        flags.best,
        flags.settings,
    )


def check_no_ensemble(flags: argparse.Namespace) -> None:
    """Raises ConfigError for flags that have no effect without ``--ensemble``."""
    for name, default in _DEFAULTS.items():
        if getattr(flags, name) != default:
            raise ConfigError(f"--{name} has no effect without {FLAG}; leave it out.")
