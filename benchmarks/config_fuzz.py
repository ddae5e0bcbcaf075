"""Settings at random: each set is refused in one sentence before anything is compiled, or trains.

    python -m benchmarks.config_fuzz --cases 2000 --seed 0

Names, types and values are drawn from what exists, from what nearly exists and from noise, around a
model of a few hundred parameters.  Every accepted case does a step; those that make the same
program share it.  ``tests/config/test_config_fuzz.py`` is the short form, for which all accepted
cases are drawn around six programs.
"""

import argparse
import dataclasses
import math
import random
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled, Traced

from benchmarks.command import run
from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.registry import LOSSES, ROUTERS
from dynmoe_jax.training.objectives import Batch
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step
from dynmoe_jax.training.trainer import BAD_INPUT, check_run

TINY = {
    "model.num_layers": 2,
    "model.width": 4,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_width": 2,
    "model.hidden_width": 4,
    "model.vocab_size": 8,
    "model.max_seq_len": 4,
    "model.moe.num_experts": 3,
    "model.moe.hidden_width": 4,
    "model.moe.backend": "reference",
    "data.seq_len": 4,
    "train.batch_size": 8,
}
"""What every case starts from."""

LEAVES = {path: field for path, field, _ in config.walk(config.Config())}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """{"model.moe.num_experts": 8} as {"model": {"moe": {"num_experts": 8}}}."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        *groups, name = path.split(".")
        place = result
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):  # an earlier value took the place of the group
                return result
        place[name] = value
    return result


def choosing(path: str) -> dict[str, Any]:
    """The settings that a setting needs to have an effect, as it declares, that choose the kind it
    belongs to, or the router that declares its loss, or weigh a loss that none declares; a dense
    model for an objective that refuses one of experts."""
    found, group, prefix = {}, config.Config(), ""
    for name in path.split(".")[:-1]:
        for field in dataclasses.fields(group):
            kind = (field.metadata.get("registry") or {}).get(name)
            if kind and dataclasses.fields(kind):
                found[f"{prefix}{field.name}"] = name
            if kind and field.name == "objective" and kind().obstacle(config.Model()):
                found["model.moe.every_n_layers"] = 0
        group, prefix = getattr(group, name), f"{prefix}{name}."
    loss = path.split(".")[1] if path.startswith("loss.") else ""
    routers = [router for router, kind in ROUTERS.items() if loss in kind.losses]
    if routers and loss not in config.MoE().route.losses:
        found["model.moe.router"] = routers[0]
    if loss in LOSSES and not routers and not path.endswith(".weight"):
        found[f"loss.{loss}.weight"] = 1.0
    needs = LEAVES[path].metadata["only_with"] if path in LEAVES else {}
    for other, wanted in needs.items():
        where = f"{prefix}{other}"
        found |= choosing(where) | {where: wanted[0] if wanted else LEAVES[where].type(1)}
    return found


def accept_or_refuse(values: dict[str, Any]) -> config.Config | str:
    """The settings, or the sentence that refuses them before anything is compiled.

    Raises:
      AssertionError: the refusal is not one sentence.
      Exception: whatever else happens is a bug.
    """
    try:
        cfg = config.from_config_dict(nested(TINY | values))
        check_run(cfg)
    except BAD_INPUT as error:
        sentence = str(error)
        assert sentence
        assert "\n" not in sentence, sentence
        assert sentence[-1] in ".?", sentence
        return sentence
    return cfg


def draw_batch(cfg: config.Config) -> Batch:
    """A whole batch of token 1."""
    shape = (cfg.train.batch_size, cfg.data.seq_len)
    return {name: np.ones(shape, np.int32) for name in BATCH_ARRAYS}


def first_step(cfg: config.Config) -> Traced:
    """(key, batch) -> (state, metrics) after the first step."""
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    step = make_train_step(cfg, optimizer, schedule)

    def init_and_step(key, batch):
        return step(init_state(cfg, optimizer, key), batch)

    return jax.jit(init_and_step).trace(jax.random.key(0), draw_batch(cfg))


def compiled(traced: Traced) -> Compiled:
    """The program, without what takes LLVM most of the time (docs/measurements.md: cpu-llvm)."""
    return traced.lower().compile(compiler_options={"xla_backend_optimization_level": 0})


def check_step(state, metrics) -> bool:
    """Whether the step updated anything; asserts that one that did left finite parameters."""
    assert int(state.step) == 1
    updated = int(metrics["skipped_updates"]) == 0
    assert updated == bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
    return updated


def draw(rng: random.Random) -> dict[str, Any]:
    """One to three settings, most of those of a kind with the setting that chooses it."""
    count = rng.choice((1, 1, 1, 2, 3))
    values = dict(_draw_one(rng) for _ in range(count))
    for path in list(values):
        if path in LEAVES and rng.random() < 0.8:
            values = choosing(path) | values
    return values


def _draw_one(rng: random.Random) -> tuple[str, Any]:
    path = rng.choice(list(LEAVES))
    if rng.random() < 0.1:  # a name with a letter too few
        cut = rng.randrange(len(path))
        return path[:cut] + path[cut + 1 :] or "x", 1
    field = LEAVES[path]
    noise = (None, True, -1, 0, 1, 10**30, "", "x", b"x", [1], {"a": 1}, math.nan, math.inf)
    if rng.random() < 0.3:
        return path, rng.choice((*noise, rng.random(), 10 ** rng.uniform(-320, 300)))
    if field.type is bool:
        return path, rng.random() < 0.5
    if field.type is str:
        return path, rng.choice((*field.metadata["choices"], "\0", "\ud800", "a" * 300, "é"))
    if field.type is int:
        return path, rng.choice(
            (1, 2, 3, 4, 8, 2**31 - 1, rng.randrange(9), rng.randrange(2**30, 2**31))
        )
    return path, rng.choice((rng.random(), 1.0, 10 ** rng.uniform(-44, 38), rng.uniform(0, 5)))


def main() -> None:
    """Prints how many cases were accepted, refused, and by which kind of error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the cases")
    asked = parser.parse_args()
    rng, counts, start = random.Random(asked.seed), Counter(), time.perf_counter()
    programs: dict[str, Compiled] = {}
    for number in range(1, asked.cases + 1):
        values = draw(rng)
        try:
            found = accept_or_refuse(values)
            if isinstance(found, str):
                counts["refused"] += 1
                continue
            traced = first_step(found)
            text = str(traced.jaxpr)
            programs[text] = programs.get(text) or compiled(traced)
            updated = check_step(*programs[text](jax.random.key(found.seed), draw_batch(found)))
            counts["trained" if updated else "trained, update skipped as not finite"] += 1
        except Exception as error:
            counts["FAILED"] += 1
            print(f"{values}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if number % 100 == 0:
            print(f"{number:>6,} of {asked.cases:,}, {len(programs)} programs", flush=True)
    for name, count in counts.most_common():
        print(f"{count:>6,} {name}")
    seconds = time.perf_counter() - start
    print(f"{asked.cases:>6,} in all, {len(programs)} programs, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
