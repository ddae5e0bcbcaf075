"""Cost of a training step by router, over that of top-2, at a mean of two experts per token.

    python -m benchmarks.router_cost --rounds=7 --json=router_cost.json

The shape is that of `benchmarks.train_step`.  Parameters and states of routers are set so that
tokens use 2.00 +- 0.02 experts on average: where the number is no setting, the routers' matrices
are scaled, or the logits of all experts are shifted, until they do.  States are put back after each
step, so that no rule moves them while they are timed.  Cases run in turns, a few at a time with
top-2 among them, as many as memory holds.  Routers that compute something else (all experts, slots,
as many tokens for every expert) are compared by what they compute, time over FLOPs
(docs/measurements.md: router-cost).
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
from benchmarks.timing import Mark, Ratio, interleave, ratio, show_progress
from benchmarks.train_cases import PRESETS, Case, Preset, settings
from benchmarks.train_jax import TrainCase
from dynmoe_jax.config import ConfigError, MoE
from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages
from dynmoe_jax.model import decoder_shapes, decoder_structure
from dynmoe_jax.model.components import RouterState
from dynmoe_jax.model.inputs import noise_key
from dynmoe_jax.training.loss import TrainingLoss

LIMIT = 1.10
SHARPEST = 4096.0
MEAN, TOLERANCE = 2.0, 0.02
BISECTIONS = 12
AT_ONCE = 4
"""Routers beside top-2 whose states are in memory together."""

PARTS = 4
"""Of a batch whose routing is looked at, one after the other."""

SHIFT = 0.02
"""Largest weight that a router gives to what all embeddings have alike."""

Knob = Callable[[nnx.State, jax.Array], nnx.State]
"""(parameters, from 0 to 1 how far to turn) -> parameters with which tokens use fewer experts."""


def scale(params: nnx.State, turn: jax.Array) -> nnx.State:
    """Multiplies the routers' matrices: sharper, so fewer experts."""
    return _changed(params, "router_DE", lambda matrix: matrix * SHARPEST**turn)


def shift(params: nnx.State, turn: jax.Array) -> nnx.State:
    """Lowers the logits of experts: all embeddings have the same first number, which routers weigh.

    Of a router with more scores than experts, such as those of null experts, the others stay.
    """
    experts = PRESETS["cpu"].model.moe.num_experts

    def lowered(matrix):
        row_E = jnp.where(jnp.arange(matrix.shape[-1]) < experts, SHIFT * (1 - 2 * turn), 0.0)
        return matrix.at[..., 0, :].set(row_E)

    params = _changed(params, "embedding_VD", lambda table: table.at[:, 0].set(1.0))
    return _changed(params, "router_DE", lowered)


def demand(params: nnx.State, turn: jax.Array) -> nnx.State:
    """Raises the cosine that every expert demands of a token (DynMoE)."""
    return _changed(params, "threshold_E", lambda threshold: jnp.full_like(threshold, turn / 4))


def _changed(params: nnx.State, name: str, change) -> nnx.State:
    return jax.tree.map_with_path(
        lambda path, x: change(x) if name in jax.tree_util.keystr(path) else x, params
    )


@dataclasses.dataclass(frozen=True)
class Router:
    """A router at a mean of two experts.

    Attributes:
      moe: settings of the layer.
      knob: what is turned until the mean is right; None: the settings give it.
      settle: steps after which the states are what they stay.
      by_flops: compared by its own FLOPs, for routers that compute more, or drop.
    """

    moe: Mapping[str, object]
    knob: Knob | None = None
    settle: int = 0
    by_flops: bool = False


_AHEAD = {"allow_non_causal": True}

ROUTERS: dict[str, Router] = {
    "top_k": Router({"router": "top_k", "top_k": {"k": 2}}),
    "top_p": Router({"router": "top_p"}, scale),
    "top_p_budget": Router({"router": "top_p", "top_p": {"experts_per_token": 2.0}}, settle=1),
    "hash": Router({"router": "hash", "hash": {"k": 2}}),
    "sigmoid_bias": Router({"router": "sigmoid_bias", "sigmoid_bias": {"k": 2}}),
    "noisy_top_k": Router({"router": "noisy_top_k", "noisy_top_k": {"k": 2}}),
    "relu": Router({"router": "relu", "relu": {"experts_per_token": 2.0}}, shift),
    "block_ffn": Router({"router": "block_ffn", "block_ffn": {"experts_per_token": 2.0}}, shift),
    "seq_top_k": Router({"router": "seq_top_k", "seq_top_k": {"k": 2}, **_AHEAD}),
    "expert_threshold": Router(
        {
            "router": "expert_threshold",
            "expert_threshold": {"experts_per_token": 2.0, "warmup_steps": 0},
        },
        settle=1,
    ),
    "top_any": Router({"router": "top_any"}, demand),
    "null_experts": Router({"router": "null_experts", "null_experts": {"k": 4}}, shift),
    "shared_null": Router({"router": "shared_null", "shared_null": {"k": 4}}, shift),
    "moe_plus_plus": Router({"router": "moe_plus_plus", "moe_plus_plus": {"k": 3}}, shift),
    "zero_computation": Router({"router": "zero_computation", "zero_computation": {"k": 3}}, shift),
    "expert_choice": Router(
        {"router": "expert_choice", "expert_choice": {"experts_per_token": 2.0}, **_AHEAD},
        by_flops=True,
    ),
    "soft": Router({"router": "soft", "soft": {"slots": 64}, **_AHEAD}, by_flops=True),
    "sphero": Router({"router": "sphero", "sphero": {"slots": 64}, **_AHEAD}, by_flops=True),
    "dense": Router({"router": "dense"}, by_flops=True),
}
"""Routers by what they are called here."""


class RouterCase(TrainCase):
    """A training step whose routers are at the mean and stay there."""

    def __init__(self, preset: Preset, name: str):
        self._router, self._calls = ROUTERS[name], 0
        self._kept: nnx.State | None = None
        moe = dataclasses.replace(preset.model.moe, **_groups(self._router.moe))
        case = Case(moe, MEAN if self._router.knob else 0.0)
        super().__init__(preset, case)
        self()
        # In the first step a budget was not held yet.
        self._count(settings(preset, case))
        if abs(self.experts_per_token - MEAN) > TOLERANCE and not self._router.by_flops:
            found = f"{self.experts_per_token:.3f}"
            raise ConfigError(f"it uses {found} experts per token instead of {MEAN:g}.")

    def __call__(self) -> float:
        """Takes one step from the states that stay; seconds."""
        params = self._state.params
        if self._calls == self._router.settle:
            self._kept = jax.tree.map(jnp.copy, nnx.filter_state(params, RouterState))
        elif self._kept:
            kept = jax.tree.map(jnp.copy, self._kept)
            self._state = dataclasses.replace(self._state, params=nnx.merge_state(params, kept))
        self._calls += 1
        return super().__call__()

    def _sharpen(self, cfg, mean: float) -> None:
        """Turns the knob until the tokens of the batch use ``mean`` experts, as in training."""
        structure = decoder_structure(cfg.model)
        loss = TrainingLoss.of(cfg, decoder_shapes(cfg.model))
        batch = self._batch | {"row": jnp.arange(len(self._batch["tokens"]))}
        split = jax.tree.map(lambda x: x.reshape(PARTS, -1, *x.shape[1:]), batch)

        @jax.jit
        def experts(params, turn):
            decoder = nnx.merge(structure, self._router.knob(params, turn))

            def of_part(part):
                load_NE = loss.counts(loss.sums(decoder, part, noise_key(0, 0))).load_NE
                return jnp.sum(load_NE) / load_NE.shape[0] / part["tokens"].size

            return jnp.mean(jax.lax.map(of_part, split))

        params, low, high = self._state.params, 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if experts(params, middle) > mean else (low, middle)
        turned = jax.jit(self._router.knob, donate_argnums=0)(params, (low + high) / 2)
        self._state = dataclasses.replace(self._state, params=turned)


def _groups(moe: Mapping[str, object]) -> dict[str, object]:
    """Settings as :class:`~dynmoe_jax.config.MoE` takes them in ``dataclasses.replace``."""
    made = MoE(**moe)
    return {name: getattr(made, name) for name in moe}


@dataclasses.dataclass(frozen=True)
class Found:
    """A router beside top-k.

    Attributes:
      name: of the router.
      over: its step over that of top-k, in the same rounds.
      by_flops: the same over its FLOPs in those of top-k.
      seconds: of its step, median.
      experts: of a token.
      flops: over those of top-k.
    """

    name: str
    over: Ratio
    by_flops: Ratio
    seconds: float
    experts: float
    flops: float

    def row(self) -> tuple[str, ...]:
        """A line of the table."""
        over, experts = str(self.over), f"{self.experts:.3f}"
        return self.name, over, f"{self.seconds:.3f}", experts, f"{self.flops:.2f}"

    def mark(self) -> Mark:
        """What is asked of it."""
        if ROUTERS[self.name].by_flops:
            return Mark(f"{self.name}, over FLOPs", LIMIT, self.by_flops)
        return Mark(self.name, LIMIT, self.over)

    def record(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def measured(names: Sequence[str], rounds: int) -> list[Found]:
    """Routers in turns with the first one; one that does not reach the mean is left out."""
    cases = {}
    for name in names:
        print(f"Compiling {name} …", file=sys.stderr, flush=True)
        try:
            cases[name] = RouterCase(PRESETS["cpu"], name)
        except ConfigError as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    seconds = interleave(cases, rounds, show_progress(rounds), in_a_row=2)
    base, found = names[0], []
    for name, case in cases.items():
        if name == base:
            continue
        flops = case.flops / cases[base].flops
        over = ratio(seconds[name], seconds[base])
        by_flops = ratio(seconds[name] / flops, seconds[base])
        median = float(np.median(seconds[name]))
        found.append(Found(name, over, by_flops, median, case.experts_per_token, flops))
    return found


def main(argv: Sequence[str]) -> None:
    """Prints each router over top-k."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    rows, figures = [("router", "over top_k [quartiles]", "s", "experts", "FLOPs over top_k")], []
    marks, others = [], names[1:]
    for start in range(0, len(others), AT_ONCE):
        for found in measured(["top_k", *others[start : start + AT_ONCE]], asked.rounds):
            rows.append(found.row())
            marks.append(found.mark())
            print(f"\n{marks[-1]}", file=sys.stderr, flush=True)
            figures.append(found.record())
    print("\n".join(columns(rows)))
    print("\n".join(map(str, marks)))
    with_machine("benchmarks.router_cost", {"routers": figures}, asked.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
