"""Estimate of how long a study takes, from a few steps that are timed."""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dynmoe_jax import config
from dynmoe_jax.data import Batch
from dynmoe_jax.mesh.make_mesh import batch_sharding, make_mesh
from dynmoe_jax.model.flops import training_flops
from dynmoe_jax.runs.compilation import compiled_programs_kept
from dynmoe_jax.study.measures import MEASURES
from dynmoe_jax.training.objectives import batch_arrays
from dynmoe_jax.training.start import compile_step, new_state

STEPS = 4

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
      flops: of one, of the experts that were used.
    """

    compile: float
    step: float
    flops: float


def models_to_time(trained: Sequence[str], usual: Sequence[str]) -> tuple[str, ...]:
    """As many models as are usual: of those that are trained the usual ones, then others."""
    return tuple(sorted(trained, key=lambda name: name not in usual)[: len(usual)])


def flops_of(cfg: config.Config) -> float:
    """FLOPs of a step of a model, as many experts used as it is taken to use."""
    tokens = cfg.train.batch_size * cfg.data.seq_len
    rows = [tokens * _experts(moe) for moe in cfg.model.moe_settings]
    return training_flops(cfg.model, tokens, cfg.data.seq_len, rows)


def _experts(moe: config.MoE) -> float:
    bounds = moe.route.bounds(moe.num_experts)
    return bounds.expected if bounds.fewest == bounds.slots else MEAN_OF_DYNAMIC


def time_steps(cfg: config.Config) -> dict[str, float]:
    """Times a few steps on tokens that are drawn.

    Returns:
      the attributes of a :class:`Timing`.
    """
    mesh = make_mesh(cfg.mesh, cfg.train.batch_size // cfg.train.microbatches)
    begin = time.perf_counter()
    # What is compiled here, runs of the same model need not compile.
    with jax.set_mesh(mesh), compiled_programs_kept(cfg.train, Path()):
        step, shapes = compile_step(cfg, mesh)
        state, batch = new_state(cfg, shapes), _drawn_batch(cfg, mesh)
        seconds, rows = [], []
        for _ in range(1 + STEPS):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - begin)
            rows.append(float(metrics["load_NE"].sum()))
            begin = time.perf_counter()
    tokens, length = cfg.train.batch_size * cfg.data.seq_len, cfg.data.seq_len
    flops = training_flops(cfg.model, tokens, length, float(np.mean(rows)))
    return {"compile": seconds[0], "step": float(np.median(seconds[1:])), "flops": flops}


def _drawn_batch(cfg: config.Config, mesh: Mesh) -> Batch:
    shape = cfg.train.batch_size, cfg.data.seq_len
    draw = np.random.default_rng(0)
    tokens_BL = draw.integers(0, cfg.model.vocab_size, shape)
    batch = dict.fromkeys(batch_arrays(cfg), np.ones(shape))
    batch |= {"tokens": tokens_BL, "targets": tokens_BL}
    batch["positions"] = np.broadcast_to(np.arange(shape[1]), shape)
    sharding = batch_sharding(mesh)
    return {name: jax.device_put(array.astype(np.int32), sharding) for name, array in batch.items()}


class Costs:
    """Seconds of jobs, from timings of a few models.

    Args:
      timings: of a few models.
    """

    def __init__(self, timings: Iterable[Timing]):
        self._timings = sorted(timings, key=lambda timing: timing.flops)

    def step(self, flops: float) -> float:
        """Seconds of a step: a line through those that were timed, or in proportion to one."""
        first, last = self._timings[0], self._timings[-1]
        # Of nearly as many FLOPs, chance would give the line its slope.
        if last.flops > 1.1 * first.flops and last.step > first.step:
            slope = (last.step - first.step) / (last.flops - first.flops)
            return max(first.step + slope * (flops - first.flops), 0.2 * first.step)
        return first.step * flops / first.flops

    @property
    def compile(self) -> float:
        """Seconds of compiling a step."""
        return max(timing.compile for timing in self._timings)

    def train(self, cfg: config.Config, steps: int) -> float:
        """Seconds of so many steps of a run, its start and end included."""
        return CLOSE * self.compile + steps * self.step(flops_of(cfg))

    def measure(self, cfg: config.Config, model: str, names: Iterable[str], domains: int) -> float:
        """Seconds of measures: passes over held-out text, a third of a step's FLOPs each."""
        batches = cfg.evaluation.max_batches * domains
        one = batches * self.step(flops_of(cfg)) / 3
        return sum(one * MEASURES[name].passes(model) + 0.5 * self.compile for name in names)
