"""Run that was begun in a folder: its settings, and whether it may go on with others."""

import contextlib
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.runs.checkpoint import FOLDER, IMPORTED, Checkpoints
from dynmoe_jax.runs.disk import not_writable
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.saving.integrity import find_damage


def make_folder(workdir: Path) -> None:
    """Makes the run's folder.

    Raises:
      ConfigError: it cannot be made or written to.
    """
    try:
        (workdir / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_writable(workdir, error) from error


def saved_config(workdir: Path) -> config.Config | None:
    """The settings of the newest checkpoint in ``workdir`` that can be read; None without one."""
    if not (workdir / FOLDER).is_dir():
        return None
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        for step in reversed(checkpoints.steps()):
            # What else is damaged is not the matter here.
            if find_damage(checkpoints.folder(step), ("config",), "config") is None:
                with contextlib.suppress(CheckpointError):
                    return checkpoints.config(step)
    return None


def check_not_imported(workdir: Path) -> None:
    """Raises ConfigError where training would begin anew on top of a model that was not trained
    there: imported, or made from others."""
    if not (workdir / FOLDER / "0").is_dir():
        return
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        if IMPORTED in checkpoints.position(0):
            raise config.ConfigError(
                f"--workdir={workdir} holds a model that was not trained there; begin with it in "
                f"another --workdir, with --config.train.init_from={workdir}."
            )


def check_compatible(saved: config.Config, current: config.Config, workdir: Path) -> None:
    """Raises ConfigError if the run in ``workdir`` cannot go on with other settings."""
    for path, stored in config.kept_groups(saved).items():
        if path.startswith("loss.") and stored.get("weight") not in (None, 0, config.AUTO):
            raise config.ConfigError(
                f"config.{path}.weight={stored['weight']} of the run in {workdir} is of a loss "
                "that is not there; name its file with --plugin=FILE."
            )
    old = {path: value for path, _, value in config.walk(saved)}
    for path, field, value in config.walk(current):
        before = old.get(path, field.default)
        if value == before:
            continue
        of_model = field.metadata["defines_model"]
        if field.metadata["fixed_in_run"] or (of_model and _states(saved) != _states(current)):
            raise config.ConfigError(
                f"config.{path}={value!r} differs from {before!r} of the checkpoint in "
                f"{workdir}; set it back, or start a new run with another --workdir."
            )


def _states(cfg: config.Config) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the states of all routers: a setting that may change must leave them."""
    width = cfg.model.width
    return [
        {n: x.shape for n, x in moe.route.layer_state(width, moe.num_experts).items()}
        for moe in cfg.model.moe_settings
    ]
