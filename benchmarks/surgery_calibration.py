"""Calibration: forward statistics in one pass over text, against evaluation's forward pass.

The same tokens and models, one dense and one with experts.  Evaluation holds the model and computes
losses, too; calibration reads it from disk layer by layer and ends in front of the output
projection.  All programs are compiled before.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.columns import columns
from benchmarks.surgery_memory import write_run
from benchmarks.surgery_part import Part
from benchmarks.timing import Mark, interleave, ratio, show_progress
from dynmoe_jax import config
from dynmoe_jax.calibration import STATISTICS, Statistics, forward, gather
from dynmoe_jax.console import console
from dynmoe_jax.evaluation.heldout import make_eval_step
from dynmoe_jax.model import decoder_structure, variable_shapes
from dynmoe_jax.runs.load import OpenedRun, opened_run

LEAST_RATE, MOST_TOGETHER = 0.75, 1.15
BATCHES, ROWS, LENGTH = 8, 4, 512
BOUND_BYTES = 4 * 10**9
ONE = ("unit_frequency", "unit_magnitude")
"""Statistics of an operation that chooses hidden units; all other ones are a second one's."""

LEFT_OUT = {"coactivation"}
DENSE = config.Model(
    num_layers=6, width=512, num_heads=8, num_kv_heads=8, head_width=64, hidden_width=1408,
    vocab_size=8192, max_seq_len=LENGTH, moe=config.MoE(every_n_layers=0),
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "experts": dataclasses.replace(
        DENSE, moe=config.MoE(num_experts=8, hidden_width=704, router="top_k")
    ),
}
HEADINGS = ("model", "evaluation tok/s", "forward alone", "one operation's", "two operations'")


def measure(asked: argparse.Namespace) -> Part:
    """Measures both models and returns the marks."""
    rows, marks, figures = [], [], {}
    for name, model in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="surgery_calibration_") as folder:
            write_run(Path(folder), model)
            with opened_run(folder) as run:
                seconds = _seconds(run, asked.rounds)
        tokens = BATCHES * ROWS * LENGTH
        rates = (f"{tokens / np.median(of_case):,.0f}" for of_case in seconds.values())
        rows.append((name, *rates))
        evaluation, _, one, two = seconds.values()
        said = f"calibration, {name}: tokens/s of all forward statistics / evaluation's forward"
        marks.append(Mark(said, LEAST_RATE, ratio(evaluation, two), at_least=True))
        said = f"calibration, {name}: seconds, two operations' statistics / one's"
        marks.append(Mark(said, MOST_TOGETHER, ratio(two, one)))
        figures[name] = {case: list(of_case) for case, of_case in seconds.items()}
    return Part(columns([HEADINGS, *rows]), marks, figures)


def forward_statistics(model: config.Model) -> list[str]:
    """Names of the statistics that a model has and that need no gradients, without pairs of
    units."""
    return [
        name
        for name, kind in STATISTICS.items()
        if name not in LEFT_OUT
        and "gradients" not in kind.needs
        and any(kind().exists(layer) for layer in model.by_layer)
    ]


def _seconds(run: OpenedRun, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each case, by ``case/same work``."""
    model, batches = run.config.model, _batches(run.config.model)
    every = forward_statistics(model)
    params = run.params(variable_shapes(model))
    step = make_eval_step(decoder_structure(model), run.config.loss)

    def evaluate():
        jax.block_until_ready([step(params, batch).nll for batch in batches])

    def gathering(names):
        return lambda: gather(run, batches, names, BOUND_BYTES, Statistics("", ""))

    work: dict[str, Callable] = {
        "evaluation": evaluate,
        "forward": lambda: forward(run, batches),
        "one": gathering(ONE),
        "two": gathering(every),
    }
    console.quiet = True
    try:
        cases = {f"{name}/pass": _timed(of_case) for name, of_case in work.items()}
        return interleave(cases, rounds, show_progress(rounds))
    finally:
        console.quiet = False


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    return run


def _batches(model: config.Model) -> list[dict[str, np.ndarray]]:
    """Drawn tokens, one document a row."""
    random, ones_BL = np.random.default_rng(0), np.ones((ROWS, LENGTH), np.int32)
    positions_BL = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones_BL.shape)
    return [
        {
            "tokens": (tokens_BL := random.integers(0, model.vocab_size, ones_BL.shape, np.int32)),
            "targets": np.roll(tokens_BL, -1, axis=1),
            "segment_ids": ones_BL,
            "positions": np.array(positions_BL),
        }
        for _ in range(BATCHES)
    ]
