"""Decode speed of a ReLU model that was split into experts, of which tokens use a quarter.

The dense model and what `split` makes of it, width 1024 and hidden width 4096, write the same
number of tokens, greedily, one sequence at a time.  The numbers are drawn: what is computed does
not depend on them.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.columns import columns
from benchmarks.process import ours, ran
from benchmarks.surgery_memory import text, write_run
from benchmarks.surgery_part import Part
from benchmarks.timing import Mark, interleave, ratio, show_progress
from benchmarks.worker import WorkerError
from dynmoe_jax import config
from dynmoe_jax.inference.generate import Generator
from dynmoe_jax.inference.sampling import Sampling
from dynmoe_jax.runs.load import load_run

LIMIT = 1.5
EXPERTS, USED = 8, 2
NEW_TOKENS, PROMPT_TOKENS = 32, 4
DENSE = config.Model(
    num_layers=4, width=1024, hidden_width=4096, num_heads=16, num_kv_heads=16, head_width=64,
    vocab_size=1024, max_seq_len=128, activation="relu", moe=config.MoE(every_n_layers=0),
)  # fmt: skip
HEADINGS = ("ReLU, decode", "tokens/s", "ms a token")


def measure(asked: argparse.Namespace) -> Part:
    """Measures both and returns the mark."""
    with tempfile.TemporaryDirectory(prefix="surgery_decode_") as name:
        dense, split = Path(name) / "dense", Path(name) / "split"
        write_run(dense, DENSE)
        command = ["-m", "dynmoe_jax.surgery", "split", f"--from={dense}", f"--to={split}"]
        settings = [f"--num_experts={EXPERTS}", f"--top_k={USED}", "--tokens=128"]
        done = ran([sys.executable, *command, *settings, f"--data={text()}"], ours())
        if done.exit_code:
            print(done.said, file=sys.stderr)
            raise WorkerError("split failed; see above.")
        models = {"dense": load_run(dense)[1], f"{USED} of {EXPERTS} experts": load_run(split)[1]}
    cases = {}
    for name, decoder in models.items():
        generator = Generator(decoder)
        for tokens in (1, NEW_TOKENS):
            cases[f"{name}/{tokens}"] = _writing(generator, tokens)
    seconds = interleave(cases, asked.rounds, show_progress(asked.rounds))
    each = {
        name: (seconds[f"{name}/{NEW_TOKENS}"] - seconds[f"{name}/1"]) / (NEW_TOKENS - 1)
        for name in models
    }
    rows = [
        (name, f"{1 / np.median(taken):,.1f}", f"{1e3 * np.median(taken):.2f}")
        for name, taken in each.items()
    ]
    dense_s, split_s = each.values()
    said = f"decode tokens/s, split with {USED / EXPERTS:.0%} of its experts / dense"
    marks = [Mark(said, LIMIT, ratio(dense_s, split_s), at_least=True)]
    figures = {"model": dataclasses.asdict(DENSE), "seconds": {n: list(s) for n, s in each.items()}}
    return Part(columns([HEADINGS, *rows]), marks, figures)


def _writing(generator: Generator, tokens: int):
    prompt = np.random.default_rng(0).integers(0, DENSE.vocab_size, (1, PROMPT_TOKENS))

    def run() -> float:
        begin = time.perf_counter()
        generator.write(
            prompt,
            [tokens],
            Sampling(temperature=0.0),
            vocab_size=DENSE.vocab_size,
            stop_ids=[],
        )
        return time.perf_counter() - begin

    return run
