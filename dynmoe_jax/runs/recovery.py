"""Choice of the checkpoint that a run goes on from: the newest one that is whole."""

from pathlib import Path

from dynmoe_jax.cluster import agreement
from dynmoe_jax.console import warn
from dynmoe_jax.runs.checkpoint import ITEMS, Checkpoints
from dynmoe_jax.runs.errors import CheckpointError
from dynmoe_jax.runs.saving.integrity import find_damage

DAMAGED_FOLDER = "damaged_checkpoints"


def newest_whole(checkpoints: Checkpoints) -> tuple[int | None, dict[int, str]]:
    """Step of the newest checkpoint without damage, and what is wrong with newer ones, by step.

    The step is None where there is no checkpoint.  Reads all files of those that it looks at.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed(checkpoints.steps()):
        damage = find_damage(checkpoints.folder(step), ITEMS)
        if damage is None:
            return step, damaged
        damaged[step] = damage
    if damaged:
        newest = max(damaged)
        raise CheckpointError(
            f"Every checkpoint in {checkpoints.folder(newest).parent} is damaged (of the newest, "
            f"step {newest}, {damaged[newest]}); bring one back from a backup, or start in another "
            "--workdir."
        )
    return None, {}


def recover(checkpoints: Checkpoints, verify: bool = True) -> int | None:
    """Step that a run goes on after: of several processes, process 0 decides.

    Args:
      checkpoints: of the run.
      verify: leave out damaged checkpoints.  They are moved out of the way, not deleted: what is
        wrong with them may be of interest.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    if not verify:
        return agreement.on_first(checkpoints.latest_step)
    step, moved = agreement.on_first(lambda: _move_damaged(checkpoints))
    if moved:
        checkpoints.reload()
    return step


def _move_damaged(checkpoints: Checkpoints) -> tuple[int | None, bool]:
    """(step of the newest whole checkpoint, whether newer ones were moved away)."""
    step, damaged = newest_whole(checkpoints)
    for bad, damage in damaged.items():
        moved = move_damaged(checkpoints, bad)
        warn(damaged_sentence(bad, f"{damage}; moved to {moved}", step))
    return step, bool(damaged)


def move_damaged(checkpoints: Checkpoints, step: int) -> Path:
    """Moves a checkpoint out of the way and returns where it lies now."""
    folder = checkpoints.folder(step)
    moved = folder.parents[1] / DAMAGED_FOLDER / folder.name
    while moved.exists():
        moved = moved.with_name(moved.name + "_again")
    moved.parent.mkdir(exist_ok=True)
    folder.rename(moved)
    return moved


def damaged_sentence(damaged: int, what: str, step: int) -> str:
    """Says that a checkpoint is damaged, and which one is used instead."""
    return (
        f"the checkpoint of step {damaged:,} is damaged ({what}); going on with the one of step "
        f"{step:,}."
    )
