"""Choice of the checkpoint that a longer run goes on from, once its learning rate has decayed.

Weights that were trained with a falling learning rate are not heated up again: with
``warmup_stable_decay`` a longer run goes on from the checkpoint of the step after which the rate
fell, and becomes the run that was asked for so many steps from the start.  What it had come to is
set aside as a folder that other commands read like a run's.
"""

import contextlib
import dataclasses
import shutil
from pathlib import Path

from dynmoe_jax import config
from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import console, warn
from dynmoe_jax.data import find_tokenizer
from dynmoe_jax.runs.checkpoint import FOLDER, ITEMS, Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.metrics_file import FILE_NAME as METRICS
from dynmoe_jax.runs.recovery import move_damaged
from dynmoe_jax.runs.saving.integrity import find_damage
from dynmoe_jax.runs.summary import FILE_NAME as SUMMARY
from dynmoe_jax.runs.summary import read_summary
from dynmoe_jax.training.optimizer import decay_start, make_schedule

DECAYED_FOLDER = "decayed"
_STABLE = "warmup_stable_decay"


def before_decay(cfg: config.Config, workdir: Path, checkpoints: Checkpoints, newest: int) -> int:
    """Step that a run goes on after: of several processes, process 0 decides.

    Says in one line where that is not the newest checkpoint, or where the learning rate rises again
    since there is none to go back to.

    Args:
      cfg: all settings.
      workdir: the run's folder.
      checkpoints: of the run, which from now on keep one for a still longer run.
      newest: step of the newest checkpoint, which is whole; 0 if there is none.
    """
    step, kept, moved = agreement.on_first(lambda: _choose(cfg, workdir, newest))
    if moved:
        checkpoints.reload()
    if cfg.optimizer.schedule == _STABLE:
        checkpoints.keep_before_decay(kept)
    return step


def rise(saved: config.Config, cfg: config.Config, step: int) -> tuple[float, float] | None:
    """(learning rate of the step, of the next one) where it had begun to fall and rises again.

    Both under the peak of ``cfg``: who raises the peak knows that.  Steps whose update was skipped
    count, so a rate may have fallen less than is said here.

    Args:
      saved: the settings that a checkpoint was written with.
      cfg: those that the run goes on with.
      step: of the checkpoint.
    """
    before = dataclasses.replace(saved.optimizer, learning_rate=cfg.optimizer.learning_rate)
    rewound, now = (config.growth_steps(each.train) for each in (saved, cfg))
    start = decay_start(before, saved.train.steps, rewound)
    # The step after the start still has the peak.
    if start is None or step <= start + 1:
        return None
    fallen = float(make_schedule(before, saved.train.steps, rewound)(step - 1))
    following = float(make_schedule(cfg.optimizer, cfg.train.steps, now)(step))
    return (fallen, following) if following > fallen else None


def _choose(cfg: config.Config, workdir: Path, newest: int) -> tuple[int, int, bool]:
    """(step to go on after, step up to which a checkpoint is kept, whether others were moved)."""
    start = decay_start(cfg.optimizer, cfg.train.steps, config.growth_steps(cfg.train)) or 0
    if not newest:
        return 0, start, False
    # A reader of its own, which waits for no other process.
    with contextlib.closing(Checkpoints(workdir, None)) as checkpoints:
        saved, step, moved = _settings(checkpoints, newest), newest, False
        risen = rise(saved, cfg, newest) if saved else None
        if risen and saved.optimizer.schedule == _STABLE:
            found, moved = _undecayed(cfg, checkpoints, newest)
            if found:
                step, moved = found, True
                _tell_way_back(found, newest, _set_aside(workdir, checkpoints, found, newest))
        if risen and step == newest:
            _tell_rise(saved, cfg, newest, risen)
        keeps = cfg.optimizer.schedule == _STABLE
        return step, _to_keep(checkpoints, step, start) if keeps else 0, moved


def _tell_way_back(step: int, newest: int, aside: Path) -> None:
    console.print(
        f"Going on from step {step:,}, before the learning rate fell; the checkpoint of "
        f"step {newest:,}, where it was lower, is kept in {aside}",
        soft_wrap=True,
        markup=False,
    )


def _tell_rise(
    saved: config.Config, cfg: config.Config, step: int, risen: tuple[float, float]
) -> None:
    asked = f"config.optimizer.schedule={cfg.optimizer.schedule!r}"
    why = (
        "no checkpoint from before it fell is there to go on from"
        if saved.optimizer.schedule == _STABLE
        else f"that is {asked} with config.train.steps={cfg.train.steps}"
    )
    warn(
        f"the learning rate rises again after step {step:,}, from {risen[0]:.3g} to "
        f"{risen[1]:.3g}: {why}."
    )


def _settings(checkpoints: Checkpoints, step: int) -> config.Config | None:
    """Settings that a checkpoint was written with; None if they cannot be read."""
    with contextlib.suppress(CheckpointError, config.ConfigError):
        return checkpoints.config(step)
    return None


def _undecayed(
    cfg: config.Config, checkpoints: Checkpoints, newest: int
) -> tuple[int | None, bool]:
    """(the newest whole checkpoint after which the rate does not rise again, whether damaged ones
    were moved)."""
    moved = False
    for step in reversed([step for step in checkpoints.steps() if step < newest]):
        saved = _settings(checkpoints, step)
        if saved is None or rise(saved, cfg, step):
            continue
        damage = find_damage(checkpoints.folder(step), ITEMS) if cfg.checkpoint.verify else None
        if damage is None:
            return step, moved
        folder, moved = move_damaged(checkpoints, step), True
        warn(f"the checkpoint of step {step:,} is damaged ({damage}); moved to {folder}.")
    return None, moved


def _set_aside(workdir: Path, checkpoints: Checkpoints, step: int, newest: int) -> Path:
    """Makes ``step`` the newest checkpoint; returns where the one that was it lies now.

    That one goes last: killed in between, the run comes here again.
    """
    for later in checkpoints.steps():
        if step < later < newest and checkpoints.folder(later).is_dir():
            shutil.rmtree(checkpoints.folder(later))
    aside = workdir / DECAYED_FOLDER / str(newest)
    while (aside / FOLDER / str(newest)).exists():
        aside = aside.with_name(aside.name + "_again")
    (aside / FOLDER).mkdir(parents=True, exist_ok=True)
    tokenizer, metrics, report = find_tokenizer(workdir), workdir / METRICS, workdir / "report.html"
    if tokenizer is not None and tokenizer.is_dir():
        shutil.copytree(tokenizer, aside / tokenizer.name, dirs_exist_ok=True)
    elif tokenizer is not None:
        shutil.copy2(tokenizer, aside)
    if metrics.exists():
        shutil.copy2(metrics, aside)
    summary = read_summary(workdir)
    if summary is not None and summary.step == newest:
        # It says that the run is complete, which it is no more.
        (workdir / SUMMARY).replace(aside / SUMMARY)
        if report.exists():
            report.replace(aside / report.name)
    checkpoints.folder(newest).rename(aside / FOLDER / str(newest))
    return aside


def _to_keep(checkpoints: Checkpoints, step: int, start: int) -> int:
    """The step after which the rate falls, ``start`` unless a run was made shorter after it."""
    for done in reversed([done for done in checkpoints.steps() if start < done <= step]):
        saved = _settings(checkpoints, done)
        fallen = saved and decay_start(
            saved.optimizer, saved.train.steps, config.growth_steps(saved.train)
        )
        if saved and (fallen is None or done <= fallen):
            return done
    return start
