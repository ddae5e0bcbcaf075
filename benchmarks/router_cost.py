"""Cost of a training step by router, over that of top-2, at a mean of two experts per token.

    python -m benchmarks.router_cost --rounds=7 --json=router_cost.json

The shape is that of `benchmarks.train_step`.  Parameters and states of routers are set so that
tokens use 2.00 +- 0.02 experts on average: where the number is no setting, the routers' matrices
are scaled, or all logits of a router are shifted, until they do.  States are put back after each
step, so that no rule moves them while they are timed.  All cases run in turns.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.columns import columns
from benchmarks.command import run
from benchmarks.machine import pin_threads, with_machine
from benchmarks.timing import Mark, interleave, ratio, show_progress
from benchmarks.train_cases import PRESETS, Case, Preset
from benchmarks.train_jax import TrainCase
from dynmoe_jax.config import ConfigError, MoE
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages
from dynmoe_jax.model.components import RouterState

LIMIT = 1.10
MEAN, TOLERANCE = 2.0, 0.02

Knob = Callable[[nnx.State, jax.Array], nnx.State]
"""Parameters, and how far to turn, from 0 to 1 -> parameters."""


def scale(params: nnx.State, turn: jax.Array) -> nnx.State:
    """Multiplies the routers' matrices by 1 to 4096: sharper, so fewer experts."""
    return _changed(params, "router_DE", lambda matrix: matrix * 4096.0**turn)


def shift(params: nnx.State, turn: jax.Array) -> nnx.State:
    """Lowers all logits: every embedding has the same first number, and every router weighs it."""
    params = _changed(params, "embedding", lambda table: table.at[..., 0].set(1.0))
    return _changed(params, "router_DE", lambda matrix: matrix.at[..., 0, :].set(-0.02 * turn))


def _changed(params: nnx.State, name: str, change) -> nnx.State:
    return jax.tree.map_with_path(
        lambda path, x: change(x) if name in jax.tree_util.keystr(path) else x, params
    )


@dataclasses.dataclass(frozen=True)
class Router:
    """A router at a mean of two experts.

    Attributes:
      moe: its settings, beside ``router``.
      knob: what is turned until the mean is right; None: the settings give it.
    """

    moe: Mapping[str, object]
    knob: Knob | None = None


ROUTERS: dict[str, Router] = {
    "top_k": Router({"top_k": {"k": 2}}),
    "top_p": Router({}, scale),
    "hash": Router({"hash": {"k": 2}}),
    "sigmoid_bias": Router({"sigmoid_bias": {"k": 2}}),
    "relu": Router({"relu": {"experts_per_token": 2.0}}, shift),
}
"""Routers that drop nothing, by their names in the registry."""


class RouterCase(TrainCase):
    """A training step whose routers are at the mean and stay there."""

    def __init__(self, preset: Preset, name: str):
        self._knob = ROUTERS[name].knob
        moe = dataclasses.replace(preset.model.moe, router=name, **_groups(ROUTERS[name].moe))
        self._kept: nnx.State | None = None
        super().__init__(preset, Case(moe, MEAN if self._knob else 0.0))
        found = self.experts_per_token
        if abs(found - MEAN) > TOLERANCE:
            raise ConfigError(f"{name} uses {found:.3f} experts per token instead of {MEAN:g}.")

    def __call__(self) -> float:
        """Takes one step from the states that were set; seconds."""
        params = self._state.params
        if self._kept is None:
            self._kept = jax.tree.map(jnp.copy, nnx.filter_state(params, RouterState))
        elif self._kept:
            kept = jax.tree.map(jnp.copy, self._kept)
            merged = nnx.merge_state(params, kept)
            self._state = dataclasses.replace(self._state, params=merged)
        return super().__call__()

    def _turned(self, params: nnx.State, turn: jax.Array) -> nnx.State:
        return self._knob(params, turn)


def _groups(moe: Mapping[str, object]) -> dict[str, object]:
    """Settings as :class:`~dynmoe_jax.config.MoE` takes them in ``dataclasses.replace``."""
    made = MoE(**moe)
    return {name: getattr(made, name) for name in moe}


def main(argv: Sequence[str]) -> None:
    """Prints each router over top-k."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=("cpu", "tiny"), default="cpu")
    parser.add_argument("--routers", default=",".join(ROUTERS), help="with commas between them")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each that count")
    parser.add_argument("--threads", type=int, default=2, help="cores")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")
    asked = parser.parse_args(argv)
    names = list(dict.fromkeys(["top_k", *asked.routers.split(",")]))
    for name in names:
        if name not in ROUTERS:
            raise ConfigError(f"--routers={name} must be some of {', '.join(ROUTERS)}.")
    restart_with_huge_pages()
    pin_threads(asked.threads)
    preset = PRESETS[asked.preset]
    cases = {}
    for name in names:
        print(f"Compiling {name} …", file=sys.stderr, flush=True)
        cases[name] = RouterCase(preset, name)
    seconds = interleave(cases, asked.rounds, show_progress(asked.rounds), in_a_row=2)
    rows, figures = [("router", "over top_k [quartiles]", "s", "experts")], []
    for name, case in cases.items():
        over, median = ratio(seconds[name], seconds["top_k"]), float(np.median(seconds[name]))
        rows.append((name, str(over), f"{median:.3f}", f"{case.experts_per_token:.3f}"))
        figures.append({"router": name, "seconds": median, "over_top_k": dataclasses.asdict(over)})
    print("\n".join(columns(rows)))
    for name in names[1:]:
        print(Mark(name, LIMIT, ratio(seconds[name], seconds["top_k"])))
    with_machine("benchmarks.router_cost", {"routers": figures}, asked.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
