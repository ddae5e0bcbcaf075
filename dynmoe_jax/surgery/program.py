"""Command of surgery; ``--help`` says how it is used."""

import sys

from dynmoe_jax.command_line import EXIT_INTERRUPTED, plugin_arguments
from dynmoe_jax.console import console
from dynmoe_jax.data import DataError
from dynmoe_jax.runs.disk import DiskError
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.surgery import arguments, operations
from dynmoe_jax.surgery.perform import BrokenPromise, perform
from dynmoe_jax.surgery.rebuild import rebuild
from dynmoe_jax.surgery.recipes import command
from dynmoe_jax.surgery.recipes.recipe import Asked, planned
from dynmoe_jax.surgery.recipes.run import run_recipe, show_steps
from dynmoe_jax.surgery.report import tables
from dynmoe_jax.surgery.request import checked

BAD_INPUT = (CheckpointError, DataError, DiskError, BrokenPromise)

assert operations  # importing them registers them

_PLUGINS = plugin_arguments(sys.argv[1:])
"""Taken from the command line before anything else is read; workers load them too."""


def _main() -> int:
    if command.is_of_recipe(sys.argv[1:]):
        return _recipe(*command.parse(sys.argv[1:]))
    flags = arguments.parse(sys.argv[1:])
    if flags.command == arguments.LIST:
        tables.show_operations()
    elif flags.command == arguments.REBUILD:
        tables.show_record(rebuild(flags.source, flags.to), flags.to)
    elif flags.plan:
        with checked(flags.asked) as job:
            tables.show_plan(job)
    else:
        tables.show_record(perform(flags.asked), flags.asked.to)
    return 0


def _recipe(asked: Asked, plan: bool) -> int:
    """Runs a recipe, or says what it costs."""
    if plan:
        show_steps(planned(asked))
        return 0
    try:
        return run_recipe(asked, _PLUGINS)
    except KeyboardInterrupt:
        console.print("Stopped; the same command continues.")
        return EXIT_INTERRUPTED


def main() -> int:
    """Does what the command line asks for; returns the exit code."""
    try:
        return _main()
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was kept.")
        return EXIT_INTERRUPTED
