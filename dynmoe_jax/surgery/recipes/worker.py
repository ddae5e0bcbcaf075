"""Process that does steps of a recipe, one after another.

    python -m dynmoe_jax.surgery.recipes.worker LOG [--plugin=FILE …]

A job (:mod:`dynmoe_jax.jobs.serve`) is ``{"kind": …, "folder": …, "job": …}``; the answer's
``found`` is the seconds that it took.
"""

import sys
import time
from pathlib import Path
from typing import Any

from dynmoe_jax.jobs.serve import serve
from dynmoe_jax.surgery import operations
from dynmoe_jax.surgery.recipes import steps
from dynmoe_jax.surgery.recipes.step import STEPS

assert operations  # importing them registers them
assert steps


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Does a step."""
    begin = time.perf_counter()
    code = STEPS[job["kind"]].do(job["job"], Path(job["folder"]))
    return {"code": code, "found": time.perf_counter() - begin}


def _bad_input() -> tuple[type[Exception], ...]:
    from dynmoe_jax.surgery.perform import BrokenPromise
    from dynmoe_jax.training.health.rescue import BadNumbers
    from dynmoe_jax.training.trainer import BAD_INPUT

    return (*BAD_INPUT, BadNumbers, BrokenPromise)


if __name__ == "__main__":
    sys.exit(serve(do, _bad_input, "a recipe"))
