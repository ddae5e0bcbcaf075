"""Runs the step again that a run stopped for, and says where its first bad number arises.

    python -m dynmoe_jax.training.health.replay --workdir=runs/mine

Reads what the run kept in ``WORKDIR/not_finite/STEP``; nothing is written.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from rich.table import Table

from dynmoe_jax import config
from dynmoe_jax.command_line import exit_code
from dynmoe_jax.console import console
from dynmoe_jax.data import DataError, kept_tokenizer
from dynmoe_jax.model import decoder_structure
from dynmoe_jax.registry import chosen
from dynmoe_jax.runs.formatting import printable
from dynmoe_jax.training.health.nan_report import (
    ArrayCheck,
    check_backward,
    check_forward,
    check_loss,
    check_state,
)
from dynmoe_jax.training.health.rescue import ARRAYS, FOLDER, SETTINGS
from dynmoe_jax.training.objectives import Batch, Objective, batch_arrays
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import StepGradients, TrainState, init_state

_LISTED = 8
_EXCERPT = 80


def replay(workdir: Path, step: int | None = None) -> list[ArrayCheck]:
    """Prints what is finite in the kept step and what is not, in the order of its computation.

    Args:
      workdir: the run's folder.
      step: one of those kept; None for the newest.

    Returns:
      the arrays that are not finite, the first one first.

    Raises:
      ConfigError: no such step is kept there, or what is kept cannot be read.
    """
    folder = _kept(workdir, step)
    cfg, state, batch = _load(folder)
    decoder = nnx.merge(decoder_structure(cfg.model), state.params)
    console.print(f"Step {folder.name} of {workdir}", markup=False, soft_wrap=True)
    bad_state = _show("State before the step", check_state(state, cfg.model))
    forward, nll_BL = check_forward(decoder, batch, cfg.loss)
    bad_forward = _show("Forward", forward)
    _print_sequences(workdir, batch, np.asarray(nll_BL))
    objective = chosen(cfg.train, "objective").prepared(kept_tokenizer(workdir))
    gradients, parts = _gradients(cfg, objective, state, batch)
    bad_loss = _show("Loss", check_loss(parts))
    bad_backward = _show(
        "Gradients, from the last layer back", check_backward(gradients, cfg.model)
    )
    found = [*bad_state, *bad_forward, *bad_loss, *bad_backward]
    console.print(_verdict(bad_state, bad_forward, bad_loss, bad_backward), soft_wrap=True)
    return found


def _kept(workdir: Path, step: int | None) -> Path:
    """The folder of a kept step."""
    folders = [path for path in (workdir / FOLDER).glob("*") if (path / SETTINGS).is_file()]
    steps = {int(path.name): path for path in folders if path.name.isdigit()}
    if not steps:
        raise config.ConfigError(
            f"--workdir={workdir} holds no step that failed; give the folder of a run that "
            "stopped because its numbers were not finite."
        )
    if step is not None and step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise config.ConfigError(f"--step={step} is not kept in {workdir}; choose from {known}.")
    return steps[max(steps) if step is None else step]


def _load(folder: Path) -> tuple[config.Config, TrainState, Batch]:
    """Settings, state and batch, on the first device."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        cfg = config.from_stored(settings)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        optimizer = make_optimizer(cfg.optimizer, make_schedule(cfg.optimizer, cfg.train.steps))
        state = jax.eval_shape(lambda key: init_state(cfg, optimizer, key), jax.random.key(0))
        array_BL = jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.data.seq_len), jnp.int32)
        like = {"state": state, "batch": dict.fromkeys(batch_arrays(cfg), array_BL)}
        shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore((folder / ARRAYS).absolute(), jax.tree.map(shaped, like))
    except (OSError, ValueError, KeyError) as error:  # json's errors and ours are ValueErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise config.ConfigError(
            f"{folder} cannot be read ({reason}); stop the run there again, or choose another step."
        ) from error
    return cfg, arrays["state"], arrays["batch"]


def _gradients(cfg: config.Config, objective: Objective, state: TrainState, batch: Batch):
    """(gradients by parameter, parts of the loss), of the whole batch at once."""
    train = dataclasses.replace(cfg.train, microbatches=1)
    step = StepGradients(dataclasses.replace(cfg, train=train), objective)
    gradients, (parts, _) = jax.jit(step)(state, batch)
    return gradients, parts


def _show(title: str, checked: list[ArrayCheck]) -> list[ArrayCheck]:
    """Prints a table of the arrays around the first bad one; returns the bad ones."""
    bad = [array for array in checked if array.bad]
    first = checked.index(bad[0]) if bad else len(checked)
    shown = checked[max(0, first - _LISTED // 2) :][:_LISTED] if bad else checked[-_LISTED:]
    table = Table(title, "largest finite", "not finite", box=None, pad_edge=False)
    for array in shown:
        style = "bold red" if array.bad else "none"
        table.add_row(array.name, f"{array.largest:.3g}", f"{array.bad:,}", style=style)
    console.print(table)
    left = len(checked) - len(shown)
    console.print(f"… and {left} more, {len(bad)} of all not finite\n" if left else "")
    return bad


def _print_sequences(workdir: Path, batch: Batch, nll_BL: np.ndarray) -> None:
    """Prints which sequences have a loss that is not finite, and how the first of them reads."""
    bad = np.flatnonzero(~np.isfinite(nll_BL).all(axis=-1))
    if not bad.size or bad.size == len(nll_BL):
        sequences = "every sequence" if bad.size else "no sequence"
        console.print(f"The loss is not finite in {sequences} of the batch.\n")
        return
    rows = ", ".join(map(str, bad[:_LISTED])) + (" …" if bad.size > _LISTED else "")
    console.print(f"The loss is not finite in the sequences {rows} of 0 to {len(nll_BL) - 1}.")
    with contextlib.suppress(DataError):  # without its tokenizer the text is all that is missing
        tokenizer = kept_tokenizer(workdir)
        position = int(np.flatnonzero(~np.isfinite(nll_BL[bad[0]]))[0])
        tokens = np.asarray(batch["tokens"][bad[0]])[: position + 1]
        text = printable(tokenizer.decode(tokens))[-_EXCERPT:]
        console.print(
            f"The first of them at position {position}, after {text!r}",
            markup=False,
            soft_wrap=True,
        )
    console.print()


def _verdict(state, forward, loss, backward) -> str:
    if state:
        return f"The state held numbers that are not finite before this step: {state[0].name}."
    if forward:
        return f"The first number that is not finite arises forward, in {forward[0].name}."
    if loss:
        return f"Every layer is finite; the first bad number arises in {loss[0].name}."
    if backward:
        return (
            "Forward is finite; the first number that is not arises backward, in the gradient of "
            f"{backward[0].name}."
        )
    return (
        f"Everything is finite on {jax.devices()[0].device_kind}: the failure comes from the norm "
        "of all gradients together, or from the devices or the compute type of the run."
    )


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--step", type=int, help="a step that was kept; the newest by default")

    def run() -> int:
        asked = parser.parse_args()
        replay(asked.workdir.expanduser(), asked.step)
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
