"""Estimate of how long a study takes, from a few steps that are timed."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynmoe_jax import config
from dynmoe_jax.data import BATCH_ARRAYS
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.training.optimizer import make_optimizer, make_schedule
from dynmoe_jax.training.step import init_state, make_train_step

STEPS = 4

EXPERTS = {"top_1": 1.0, "top_2": 2.0}
MEAN_OF_DYNAMIC = 2.5
"""Experts per token that a top-p model is taken to use, over all of a short training."""

CLOSE = 2.0
"""Compilations of a run, beside that of its step: evaluation, sample, measures; in those of the
step."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Timing of a model's step.

    Attributes:
      compile: seconds until the first step is done.
      step: seconds of one, median.
      flops: of one.
    """

    compile: float
    step: float
    flops: float


def flops_of(cfg: config.Config, model: str) -> float:
    """FLOPs of a step of a model, as many experts used as it is taken to use."""
    tokens = cfg.train.batch_size * cfg.data.seq_len
    experts = EXPERTS.get(model, MEAN_OF_DYNAMIC) * cfg.model.num_moe_layers
    return training_flops(cfg.model, tokens, cfg.data.seq_len, experts * tokens)


def time_steps(cfg: config.Config) -> dict[str, float]:
    """Times a few steps on tokens that are drawn.

    Returns:
      ``compile`` and ``step``, as in :class:`Timing`.
    """
    schedule = make_schedule(cfg.optimizer, cfg.train.steps)
    optimizer = make_optimizer(cfg.optimizer, schedule)
    step = jax.jit(make_train_step(cfg, optimizer, schedule), donate_argnums=0)
    shape = cfg.train.batch_size, cfg.data.seq_len
    draw = np.random.default_rng(0)
    tokens_BL = jnp.asarray(draw.integers(0, cfg.model.vocab_size, shape), jnp.int32)
    batch = dict.fromkeys(BATCH_ARRAYS, jnp.ones(shape, jnp.int32))
    batch |= {"tokens": tokens_BL, "targets": tokens_BL}
    batch["positions"] = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    state = jax.jit(lambda key: init_state(cfg, optimizer, key))(jax.random.key(cfg.seed))
    seconds = []
    for _ in range(1 + STEPS):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - begin)
    return {"compile": seconds[0], "step": float(np.median(seconds[1:]))}


class Costs:
    """Seconds of jobs, from timings of a few models.

    Args:
      timings: by model; empty: nothing is known, and all jobs count alike.
    """

    def __init__(self, timings: Mapping[str, Timing]):
        self._timings = list(timings.values())

    def step(self, flops: float) -> float:
        """Seconds of a step: a line through those that were timed, or in proportion to one."""
        first, last = self._timings[0], self._timings[-1]
        if last.flops > first.flops and last.step > first.step:
            slope = (last.step - first.step) / (last.flops - first.flops)
            return max(first.step + slope * (flops - first.flops), 0.2 * first.step)
        return first.step * flops / first.flops

    @property
    def compile(self) -> float:
        """Seconds of compiling a step."""
        return max(timing.compile for timing in self._timings)

    def train(self, cfg: config.Config, model: str) -> float:
        """Seconds of training a run, its start and end included."""
        if not self._timings:
            return math.nan
        return CLOSE * self.compile + cfg.train.steps * self.step(flops_of(cfg, model))

    def measure(self, cfg: config.Config, model: str, names: Mapping[str, Any], domains: int):
        """Seconds of measures: passes over held-out text, a third of a step's FLOPs each."""
        if not self._timings or not names:
            return 0.0 if self._timings else math.nan
        batches = cfg.evaluation.max_batches * domains
        one = batches * self.step(flops_of(cfg, model)) / 3
        passes = {"heldout": 1, "hardness": 2, "other_rules": 12 if model == "dynamic" else 4}
        return sum(one * passes.get(name, 1) + 0.5 * self.compile for name in names)
