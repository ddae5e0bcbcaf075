"""Process that trains and measures runs of a study, one after another.

    python -m dynmoe_jax.study.running.worker LOG [--plugin=FILE …]

A job (:mod:`dynmoe_jax.jobs.serve`) is ``{"train": folder, "settings": …}``,
``{"measure": folder, "names": …, "items": …}`` or ``{"time": settings}``.
"""

import sys
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.jobs.serve import serve, wait_for
from dynmoe_jax.runs.records import write_atomically
from dynmoe_jax.study.comparison.plan import FAILED


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Does a job, see above; returns ``code`` and what was ``found``."""
    if "train" in job:
        return {"code": _train(job)}
    if "measure" in job:
        from dynmoe_jax.study.measures.measuring import measure

        measure(Path(job["measure"]), job["names"], job["items"] and Path(job["items"]))
        return {}
    from dynmoe_jax.study.running.estimate import time_steps

    return {"found": time_steps(config.from_config_dict(job["time"]))}


def _train(job: dict[str, Any]) -> int:
    from dynmoe_jax.training.health.rescue import BadNumbers
    from dynmoe_jax.training.trainer import train

    folder = Path(job["train"])
    wait_for(folder)
    try:
        return train(config.from_config_dict(job["settings"]), folder)
    except BadNumbers as error:  # a result of its own: another try would end alike
        write_atomically(folder / FAILED, f"{error}\n")
        return 0


def _bad_input() -> tuple[type[Exception], ...]:
    from dynmoe_jax.training.trainer import BAD_INPUT

    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(serve(do, _bad_input, "a study"))
